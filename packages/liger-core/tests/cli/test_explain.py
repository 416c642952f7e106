"""explain: what it says is what apply does, from a type, a file or a folder, without weights, network, foreign code."""

from __future__ import annotations

import json
import socket
import sys

import pytest
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaForSequenceClassification

import liger
from liger.cli.explain import explain
from liger.testing import TINY


@pytest.fixture
def saved(tmp_path):
    """Writes a config.json with these values beside TINY's; its folder."""

    def saved(**values):
        stated = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY, **values}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        return tmp_path

    return saved


def by_name(parts):
    return {(part["name"], part["kind"], part["class"]): part for part in parts}


def test_the_document_has_these_keys(llama, document, saved):
    status, found = document("explain", saved())
    assert status == 0
    assert list(found) == [
        "schema", "command", "source", "model", "adapters", "swapped", "declined", "untouched", "notes",
    ]  # fmt: skip
    assert (found["schema"], found["command"], found["notes"]) == (1, "explain", [])
    assert found["model"] == {"class": "LlamaForCausalLM", "model_type": "llama"}
    assert found["adapters"] == [{"model": "llama", "distribution": "liger-llama", "version": "1.2.3"}]
    assert all(part.keys() == {"name", "kind", "class", "runs"} for part in found["swapped"])
    assert all(part.keys() == {"name", "class"} for part in found["untouched"])


@pytest.mark.parametrize("values", [{}, {"hidden_act": "relu"}])
def test_it_says_what_apply_does(llama, saved, values):
    folder = saved(**values)
    found = explain(str(folder)).data
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    patch = liger.apply(model)
    assert by_name(found["swapped"]).keys() == {(s.name, s.kind, s.cls) for s in patch.swapped}
    assert {name: part["reason"] for name, part in by_name(found["declined"]).items()} == {
        (d.name, d.kind, d.cls): d.reason for d in patch.declined
    }
    assert bool(found["declined"]) is bool(values)
    touched = {part["name"] for part in (*found["swapped"], *found["declined"])}
    assert touched.isdisjoint(part["name"] for part in found["untouched"])
    assert touched | {part["name"] for part in found["untouched"]} == {name for name, _ in model.named_modules()}


def test_a_folder_its_file_and_a_type_are_the_same_model(llama, saved):
    folder, answers = saved(), []
    for source in (folder, folder / "config.json", "llama"):
        found = explain(str(source)).data
        answers.append({part["class"]: part["runs"] for part in found["swapped"]})
    assert answers[0] == answers[1] == answers[2] != {}


def test_nothing_is_loaded_downloaded_or_made(llama, saved, monkeypatch):
    def fails(*_, **__):
        raise AssertionError("explain went to the network")

    built = []
    monkeypatch.setattr(socket.socket, "connect", fails)
    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setattr("liger.cli.explain.plan", lambda model, adapters: built.append(model) or liger.Patch())
    explain(str(saved(auto_map={"AutoModelForCausalLM": "someone/llama--modeling.Llama"}, architectures=None)))
    assert type(built[0]) is LlamaForCausalLM
    assert all(parameter.is_meta for parameter in built[0].parameters())


def test_the_class_is_the_one_that_the_config_names(llama, saved):
    found = explain(str(saved(architectures=["LlamaForSequenceClassification"]))).data
    assert found["model"]["class"] == "LlamaForSequenceClassification"
    assert "loss" not in {part["kind"] for part in found["swapped"]}
    assert {"norm", "mlp", "rope"} == {part["kind"] for part in found["swapped"]}
    model = LlamaForSequenceClassification(LlamaConfig.from_pretrained(saved()))
    assert len(liger.apply(model).swapped) == len(found["swapped"])


@pytest.mark.parametrize("named", [None, ["MyLlamaForCausalLM"], ["AutoModelForCausalLM"], ["LlamaConfig"]])
def test_a_class_that_transformers_does_not_have_is_its_own_for_that_type(llama, saved, named):
    assert explain(str(saved(architectures=named))).data["model"]["class"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("model_type", "built"),
    [
        ("t5gemma", "T5GemmaForConditionalGeneration"),
        ("llava", "LlavaForConditionalGeneration"),
        ("qwen2_5_omni", "Qwen2_5OmniForConditionalGeneration"),
        ("clip", "CLIPModel"),
    ],
)
def test_a_type_that_is_no_causal_lm_is_built_as_what_it_is(install, model_type, built, document):
    install()
    status, found = document("explain", model_type)
    assert status == 1
    assert f"no adapter for {built}" in found["error"]


def test_quantised_weights_are_said_to_change_what_is_seen(llama, saved, run):
    folder = saved(quantization_config={"quant_method": "gptq", "bits": 4})
    (note,) = explain(str(folder)).data["notes"]
    assert note.startswith("quantization_config: ")
    assert note in run("explain", folder)[1]


def test_that_liger_is_disabled_is_noted(llama, saved, monkeypatch):
    monkeypatch.setattr("liger.cli.explain.DISABLED", True)
    answer = explain(str(saved()))
    assert answer.data["notes"] == ["LIGER_DISABLE is set: as long as it is, liger.apply swaps nothing."]
    assert answer.data["swapped"]


def test_by_kind_modules_are_counted_and_by_module_each_has_a_line(llama, saved, run):
    folder = saved(hidden_act="relu")
    status, page, _ = run("explain", folder)
    assert status == 0
    assert page.startswith("LlamaForCausalLM, model type llama, by liger-llama 1.2.3 (llama)\n")
    assert "| norm |       5 | LlamaRMSNorm     | rms_norm" in page
    assert "| mlp  |       2 | LlamaMLP | " in page
    assert "14 Linear" in page
    _, page, _ = run("explain", folder, "--modules")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")][2:]
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    assert [row[0] for row in rows] == [name or "(the model)" for name, _ in model.named_modules()]
    assert ["model.layers.0.self_attn", "rope", "LlamaAttention", "swapped", "rotary"] in rows
    assert ["model.layers.0.self_attn.q_proj", "–", "Linear", "untouched", "no kernel is meant for it"] in rows
    assert ["model.layers.1.mlp", "mlp", "LlamaMLP", "declined"] in [row[:4] for row in rows]


def test_a_model_without_adapter_exits_with_1_and_says_what_to_install(install, run):
    install()
    status, out, err = run("explain", "llama")
    assert (status, out) == (1, "")
    assert "no adapter for LlamaForCausalLM" in err
    assert "pip install liger-llama" in err


def test_an_adapter_out_of_range_exits_with_1(llama, install, run):
    install(("llama", "liger-llama", llama, "transformers<5"))
    status, _, err = run("explain", "llama")
    assert status == 1
    assert "requires transformers<5, but transformers" in err


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "is not the config of a model: JSONDecodeError"),
        ("[]", "is not the config of a model: TypeError"),
        ("{}", "is not the config of a model: KeyError: 'model_type'"),
        ('{"model_type": "mine"}', "has no model type 'mine'"),
        ('{"model_type": "mine", "auto_map": {}}', "its code comes with the checkpoint (auto_map), and is not run"),
        ('{"model_type": "llama", "hidden_size": 50, "num_attention_heads": 4}', "ValueError"),
    ],
)
def test_a_config_that_cannot_be_read_or_built_exits_with_2(llama, tmp_path, run, written, said):
    (tmp_path / "config.json").write_text(written)
    status, out, err = run("explain", tmp_path)
    assert (status, out) == (2, "")
    assert said in err
    assert str(tmp_path) in err


def test_without_transformers_it_says_so(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run("explain", "llama")
    assert status == 2
    assert "explain needs transformers" in err


def test_what_is_nothing_exits_with_2_and_names_what_is_near(llama, run, tmp_path):
    status, _, err = run("explain", "lama")
    assert status == 2
    assert "did you mean llama" in err
    assert run("explain", tmp_path)[0] == 2  # a folder without config.json
