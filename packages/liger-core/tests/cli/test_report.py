"""The report: what it holds, that it says what the ops really run, and that nothing broken keeps it from being made."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import pytest
import torch

from liger.adapter import Adapter
from liger.cli import hardware, report
from liger.cli.hardware import ops_run, why_no_gpu
from liger.ops import launch, rms_norm

FUTURE = Adapter(modeling="transformers.models.llama99.modeling_llama99")


def described(document, model):
    (found,) = (adapter for adapter in document["adapters"] if adapter["model"] == model)
    return found


def test_the_document_has_these_keys(llama, document):
    status, found = document()
    assert status == 0
    assert list(found) == [
        "schema", "command", "python", "platform", "versions", "environment", "cuda", "hip", "driver", "gpus", "ops",
        "adapters", "problems",
    ]  # fmt: skip
    assert (found["schema"], found["command"], found["problems"]) == (1, "report", [])
    assert found["python"] == platform.python_version()
    assert found["versions"].keys() >= {"liger-core", "torch", "triton", "transformers"}
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["ops"].keys() == {"run", "because", "trial"}
    assert found["adapters"] == [
        {
            "model": "llama",
            "distribution": "liger-llama",
            "version": "1.2.3",
            "requires": ["liger-core<1,>=0.1"],
            "classes": ["LlamaForCausalLM"],
            "problem": None,
        }
    ]


def test_what_is_not_installed_is_null_or_left_out(llama, document, monkeypatch):
    monkeypatch.setattr(report, "_REQUIRED", ("torch", "no-such-package"))
    monkeypatch.setattr(report, "_BESIDE", ("no-such-package-either",))
    assert document()[1]["versions"] == {"torch": importlib.metadata.version("torch"), "no-such-package": None}


def test_variables_that_change_what_runs_are_listed(llama, document, run, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0,1"))
    assert document()[1]["environment"]["CUDA_VISIBLE_DEVICES"] == os.environ["CUDA_VISIBLE_DEVICES"]
    assert "| CUDA_VISIBLE_DEVICES | " in run()[1]


@pytest.mark.parametrize("interpreted", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("installed", [True, False])
def test_it_says_what_an_op_decides(installed, enabled, interpreted, device, monkeypatch):
    if not installed:
        monkeypatch.setattr(launch, "triton", None)
    monkeypatch.setattr(launch, "enabled", enabled)
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    what, because = ops_run()
    assert what == ("kernels" if launch.runs_kernels(torch.empty(1, device=device)) else "references")
    named = "Triton is not" if not installed else "LIGER_DISABLE" if not enabled else "TRITON_INTERPRET"
    assert (named in because) is (not installed or not enabled or interpreted)


def test_why_there_is_no_gpu_is_said_by_torch(monkeypatch, llama, document):
    def init():
        raise RuntimeError("Found no NVIDIA driver on your system. Please check\nand so on")

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    _, found = document()
    reason = "no GPU: Found no NVIDIA driver on your system. Please check"
    assert found["ops"] == {"run": "references", "because": reason, "trial": None}
    assert found["gpus"] == []


@pytest.mark.gpu
def test_a_gpu_is_described(llama, document):
    _, found = document()
    assert why_no_gpu() is None
    assert found["gpus"][0]["name"] == torch.cuda.get_device_name(0)
    assert found["gpus"][0]["memory_gib"] > 1
    assert found["driver"] or found["hip"]


def test_the_driver_is_what_nvidia_smi_says(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '570.86.10\\n570.86.10\\n'\n")
    program.chmod(0o755)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: str(program) if name == "nvidia-smi" else None)
    assert hardware.driver_version() == "570.86.10"
    program.write_text("#!/bin/sh\necho no devices\nexit 6\n")
    assert hardware.driver_version() is None
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(hardware, "_PATIENCE", 0.1)
    assert hardware.driver_version() == "nvidia-smi does not answer"


@pytest.mark.skipif(launch.triton is None, reason="there is no Triton on this platform")
def test_a_kernel_is_tried(llama, document, run, monkeypatch):
    assert document()[1]["ops"]["trial"] == "passed"

    def fails(x):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(report, "rms_norm", fails)
    status, found = document()
    assert status == 1
    assert found["ops"]["trial"] == "RuntimeError: Failed to find C compiler"
    assert found["problems"] == ["a kernel fails: RuntimeError: Failed to find C compiler"]
    assert "FAILS" in run()[1]


@pytest.mark.skipif(launch.triton is None, reason="there is no Triton on this platform")
@pytest.mark.parametrize("wrong", [lambda x: rms_norm(x) + 0.01, lambda x: rms_norm(x).detach() + 0 * x])
def test_a_kernel_that_is_wrong_in_either_direction_fails_its_trial(llama, document, monkeypatch, wrong):
    monkeypatch.setattr(report, "rms_norm", wrong)
    status, found = document()
    assert status == 1
    assert found["ops"]["trial"].startswith("AssertionError")


def test_adapters_that_cannot_be_used_have_the_reason_and_the_others_go_on(llama, install, document, run):
    install(
        ("llama", "liger-llama", llama, "transformers>=5"),
        ("phi", "liger-phi", llama, "transformers<5"),
        ("qwen2", "liger-qwen", ImportError("no module\nnamed x")),
        ("gemma", "liger-gemma", "no adapter"),
        ("llama99", "liger-llama", FUTURE, "transformers>=5"),
    )
    status, found = document()
    assert status == 1
    assert described(found, "llama")["problem"] is None
    assert "requires transformers<5, but transformers" in described(found, "phi")["problem"]
    assert described(found, "qwen2")["problem"] == "ImportError: no module named x"
    assert "must be the Adapter of transformers.models.gemma" in described(found, "gemma")["problem"]
    assert "has no transformers.models.llama99" in described(found, "llama99")["problem"]
    assert [problem.partition(":")[0] for problem in found["problems"]] == [
        "liger-gemma 1.2.3, gemma", "liger-llama 1.2.3, llama99", "liger-phi 1.2.3, phi", "liger-qwen 1.2.3, qwen2",
    ]  # fmt: skip
    status, page, _ = run()
    assert status == 1
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    assert ["liger-llama", "1.2.3", "transformers>=5", "works", "llama"] in rows
    assert ["liger-llama", "1.2.3", "transformers>=5", "cannot be used", "llama99"] in rows
    assert "- liger-qwen 1.2.3, qwen2: ImportError: no module named x" in page


def test_what_the_core_itself_requires_is_looked_at_too(llama, document, run, monkeypatch):
    required = ["torch>=99", "triton>=3; sys_platform == 'nowhere'", "rich>=99; extra == 'cli'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required if name == "liger-core" else [])
    status, found = document()
    assert status == 1
    version, torchs = (importlib.metadata.version(name) for name in ("liger-core", "torch"))
    assert found["problems"] == [f"liger-core {version} requires torch>=99, but torch {torchs} is installed"]
    assert f"- {found['problems'][0]}" in run()[1]


def test_two_packages_that_claim_one_model_are_a_problem_of_the_report(llama, install, document):
    install(("llama", "liger-llama", llama), ("llama", "other-llama", llama))
    status, found = document()
    assert status == 1
    assert found["adapters"] == []
    assert "both liger-llama 1.2.3 and other-llama 1.2.3" in found["problems"][0]


def test_no_adapter_is_no_error(install, run):
    install()
    status, page, _ = run()
    assert status == 0
    assert "No adapter can be found" in page
