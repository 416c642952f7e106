"""The examples, by the commands of their README: each trains, on a tiny model, and its loss falls."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from environment_of_references import REFERENCES
from liger.testing.plugin import HAS_GPU

EXAMPLES = Path(__file__).parent.parent / "examples"
README = (EXAMPLES / "README.md").read_text("utf-8")
COMMANDS = {
    match["script"]: match[0]
    for match in re.finditer(r"^(?:python|torchrun --nproc-per-node 2) examples/(?P<script>\w+)\.py .*$", README, re.M)
}
NEEDS = dict(re.findall(r"^\| `(\w+)\.py` \|.*\| ([\w, ]*) ?\|$", README, re.M))
PROCESSES = torch.cuda.device_count() or 2
LOSS = re.compile(r"(?:step \d+: )?loss (\d+\.\d+)(?: -> (\d+\.\d+))?")


def run(folder, command):
    """What the command prints, typed at the root of a clone; here it writes into `folder`."""
    words = command.replace("examples/", f"{EXAMPLES}/").split()
    if words[0] == "torchrun":  # on a port of its own, since the tests beside this one may run it too
        words[:3] = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
        one = {}
    else:  # a Trainer of one process would wrap the model in DataParallel, which TRL's DPO refuses
        one = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    words[0] = sys.executable
    done = subprocess.run(words, cwd=folder, env=REFERENCES | one, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def losses(printed):
    """(first, last) of every run that was printed."""
    found = [LOSS.search(line) for line in printed.splitlines()]
    pairs = [(float(m[1]), float(m[2])) for m in found if m and m[2]]
    steps = [float(m[1]) for m in found if m and m[0].startswith("step")]
    return pairs or [(steps[0], steps[-1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where there is a tiny-llama."""
    folder = tmp_path_factory.mktemp("examples")
    run(folder, COMMANDS["random_llama"])
    return folder


def trained(folder, script, **other_sizes):
    """What the example prints; every loss in it is finite and falls."""
    for package in filter(None, re.split(r",\s*", NEEDS[script].strip())):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    command = COMMANDS[script]
    for name, value in other_sizes.items():
        command = re.sub(rf"--{name} \S+", f"--{name} {value}", command)
    output = run(folder, command)
    for first, last in losses(output):
        assert math.isfinite(first)
        assert last < first - 0.01, output
    return output


def assert_patched(output):
    for swapped in (r"norm +5 × LlamaRMSNorm →", r"mlp +2 × LlamaMLP →", r"rope +2 × LlamaAttention →",
                    r"loss +1 × Linear → linear_cross_entropy"):  # fmt: skip
        assert re.search(swapped, output), output


def test_readme_has_a_command_for_every_script():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    without = {"demo", "demo_text", "demo_report", "python_help"}
    assert COMMANDS.keys() == scripts - without
    assert NEEDS.keys() == scripts - without - {"random_llama"} | {"demo"}


@pytest.mark.parametrize("script", ["sft_trainer", "lightning_module", "dpo_trl", "compiled_pretraining"])
def test_trains_a_patched_model(folder, script):
    assert_patched(trained(folder, script))


def test_a_model_of_ones_own(folder):
    assert {"RMSNorm(", "SwiGLU(", "LinearCrossEntropyLoss("} <= set(
        re.findall(r"\w+\(", trained(folder, "custom_model"))
    )


@pytest.mark.skipif(HAS_GPU and PROCESSES < 2, reason="needs a GPU for each of two processes")
@pytest.mark.parametrize("script", ["fsdp2", "zero3"])
def test_several_processes_train_together(folder, script):
    output = trained(folder, script)
    assert_patched(output)
    assert len(re.findall(r"^step 1: loss", output, re.M)) == 1, "the mean over the processes, printed once"


def merged_losses(output):
    return [float(loss) for line in output.splitlines() if "merged" in line for loss in re.findall(r"\d+\.\d+", line)]


def test_lora_is_trained_saved_merged_and_loaded(folder):
    output = trained(folder, "lora")
    assert_patched(output)
    when_trained, loaded, merged = merged_losses(output)
    assert loaded == pytest.approx(when_trained, abs=1e-3)
    assert merged == pytest.approx(when_trained, abs=1e-3)


def test_qlora_trains_as_stock_does_and_is_merged(folder):
    output = trained(folder, "qlora")
    assert_patched(output)
    stock, patched = losses(output)
    assert patched == pytest.approx(stock, abs=0.02)
    merged, loaded = merged_losses(output)
    assert loaded == pytest.approx(merged, abs=1e-3)


@pytest.mark.gpu
def test_qlora_takes_less_memory_than_stock(folder):
    output = trained(folder, "qlora", length=1024)
    stock, patched = (float(gib) for gib in re.findall(r"peak (\d+\.\d+) GiB", output))
    assert patched < stock, output
