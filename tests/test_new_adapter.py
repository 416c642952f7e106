"""The package that scripts/new_adapter.py writes for a model of nobody's is what a maintainer would write."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hatchling import build as hatchling

import liger
from liger.layers import Stock
from new_adapter import left_out, main, texts, write
from try_kernels import find

QUICK = "not kernel and not compiles"


def found(model, **options):
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return find(modeling, options)


@pytest.mark.parametrize("model", ["llama", "gemma2", "mixtral", "phi3"])
def test_by_trying_it_finds_what_a_familys_maintainer_wrote(model):
    theirs, ours = liger.adapters()[model].load(), found(model).adapter
    assert dict(ours.modules) == dict(theirs.modules)
    assert dict(ours.functions) == dict(theirs.functions)
    assert ours.heads == theirs.heads


def run(folder, *command, **options):
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, **options
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(("model", "given"), [("olmo2", []), ("granite", ["--set", "head_dim=12"])])
def test_a_model_of_nobodys_gets_a_package_that_passes_the_contract(model, given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["new_adapter.py", model, "--to", str(tmp_path), *given])
    main()
    folder = tmp_path / f"liger-{model}"
    assert "Left to transformers:\nnothing that has the look of" in capsys.readouterr().out
    status, said = run(folder, "pytest", "-q", "-k", QUICK, timeout=300)
    assert status == 0, said
    counts = re.search(r"(\d+) passed", said)
    assert counts
    assert int(counts[1]) > 15
    code = folder / "src" / f"liger_{model}" / "__init__.py"
    assert len(code.read_text().splitlines()) <= 40
    assert run(folder, "ruff", "check", "--select", "E,F", "--line-length", "120", ".")[0] == 0


def test_the_guide_shows_what_is_written():
    """The contract that its blocks must pass is the one above."""
    guide = (
        (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text("utf-8").partition("## Adding a model family")[2]
    )
    blocks = re.findall(r"```python\n(.*?)```", guide.partition("\n## ")[0], re.S)
    with tempfile.TemporaryDirectory() as folder:
        write(found("granite"), Path(folder))
        for path, block in zip(["src/liger_granite/__init__.py", "tests/test_granite.py"], blocks, strict=True):
            assert (Path(folder) / path).read_text("utf-8") == block


def test_its_wheel_is_found_by_liger_apply(tmp_path, monkeypatch):
    write(found("granite"), tmp_path / "package")
    monkeypatch.chdir(tmp_path / "package")
    wheel = hatchling.build_wheel(str(tmp_path))
    program = """if True:
        import json, sys
        sys.path.insert(0, sys.argv[1])
        import liger
        from transformers import GraniteConfig, GraniteForCausalLM
        from liger.testing import TINY
        patch = liger.apply(GraniteForCausalLM(GraniteConfig(**TINY)))
        found = liger.adapters()["granite"].distribution
        print(json.dumps([found, sorted({s.kind for s in patch.swapped}), patch.declined]))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / wheel)], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout) == ["liger-granite", ["loss", "mlp", "norm", "rope"], []]


def test_what_no_kernel_computes_is_named_with_the_reason():
    cohere = found("cohere")
    assert isinstance(cohere.adapter.modules["CohereLayerNorm"], Stock)
    assert cohere.adapter.heads[0].logit_scale == "logit_scale"
    assert list(left_out(cohere)) == [
        "`CohereLayerNorm` computes what no layer of liger.layers does.",
        "`apply_rotary_pos_emb` does not rotate halves as liger.ops.rotary does.",
    ]
    test = texts(cohere)["tests/test_cohere.py"]
    assert "'CohereLayerNorm': 'computes what no layer" in test


def test_two_numbers_of_a_model_are_not_taken_for_each_other():
    """A mixture of experts has the weight of its auxiliary loss too."""
    moe = found("granitemoe")
    assert moe.adapter.heads[0].logit_divisor == "logits_scaling"
    assert moe.options["router_aux_loss_coef"] != moe.options["logits_scaling"]


SMALL_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 16}


@pytest.mark.parametrize(
    ("model", "mlp", "options"), [("seed_oss", "SeedOssMLP", {}), ("falcon_h1", "FalconH1MLP", SMALL_MAMBA)]
)
def test_a_number_that_a_default_config_hides_is_seen(model, mlp, options):
    """Seed's MLP has a dropout, Falcon's two multipliers, which no layer of ours has."""
    adapter = found(model, **options).adapter
    assert isinstance(adapter.modules[mlp], Stock)
    assert adapter.heads, "the dropout in Seed's attention does not hide what the loss is"


def test_the_contract_compares_no_random_numbers():
    assert found("seed_oss").options["attention_dropout"] == 0.0


def test_a_loss_that_no_head_computes_is_left_alone(monkeypatch):
    """Arithmetic on the logits that changes nothing here: with other weights it might, so it is not taken."""
    from transformers.models.granite import modeling_granite

    def forward(self, input_ids=None, labels=None, use_cache=None, **kwargs):
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = logits + 0.0
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return modeling_granite.CausalLMOutputWithPast(loss=loss, logits=logits)

    monkeypatch.setattr(modeling_granite.GraniteForCausalLM, "forward", forward)
    adding = find(modeling_granite, {})
    assert adding.adapter.head is None
    assert "The loss of `GraniteForCausalLM`" in list(left_out(adding))[-1]


def test_a_forward_that_computes_its_loss_by_itself_has_no_head():
    assert found("whisper").adapter.head is None


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("llama", "liger-llama, which is installed, has an adapter for it"),
        ("no_such", "has no transformers.models.no_such.modeling_no_such"),
        ("gpt2", "has no class …ForCausalLM, only GPT2DoubleHeadsModel, "),
        ("helium", "does not run: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_what_cannot_be_written_is_said(model, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["new_adapter.py", model, "--to", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
