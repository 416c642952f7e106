"""bench: it runs, its document, its stock functions compute what the ops do, and it refuses where it would mislead."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from liger import ops
from liger.cli import bench as bench_module
from liger.cli.bench import bench
from liger.cli.op_cases import CASES
from liger.cli.training_step import FAMILIES, SETTINGS, TINY, Setting, training_step
from liger.ops import launch
from liger.testing.error_rule import relative_error

pytestmark = pytest.mark.usefixtures("no_interpreter")

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)


def test_the_document_has_these_keys(llama, document, device):
    status, found = document("bench", "--tiny", "--only", "swiglu", "--only", "step")
    assert status == 0
    assert list(found) == ["schema", "command", "device", "versions", "tiny", "ops", "step", "left_out", "seconds"]
    assert (found["schema"], found["command"], found["tiny"]) == (1, "bench", True)
    (op,) = found["ops"]
    assert op.keys() == {"op", "shape", "ways", "speedup"}
    assert (op["op"], op["shape"]) == ("swiglu", [8, 64])
    assert list(op["ways"]) == ["eager", "compile", "liger"]
    assert all(way.keys() == {"ms", "peak_mib"} and way["ms"] > 0 for way in op["ways"].values())
    assert op["speedup"] == op["ways"]["eager"]["ms"] / op["ways"]["liger"]["ms"]
    step = found["step"]
    assert step.keys() == {
        "model_type", "parameters", "batch", "sequence", "swapped", "ways", "speedup",
    }  # fmt: skip
    assert list(step["ways"]) == ["eager", "liger"]
    assert all(way.keys() == {"ms", "tokens_per_second", "peak_gib"} for way in step["ways"].values())
    assert all(way["tokens_per_second"] == pytest.approx(16 / way["ms"] * 1e3) for way in step["ways"].values())
    assert step["swapped"] == 11
    assert (step["ways"]["liger"]["peak_gib"] is None) is (device.type == "cpu")


def test_every_op_runs_and_has_its_row(llama, run):
    status, page, progress = run("bench", "--tiny")
    assert status == 0, page
    assert "Tiny sizes" in page
    assert "liger is" in page
    for name in ops.__all__:
        assert (f"| {name} " in page) is (name in {case.op for case in CASES})
        assert (f"\n{name} " in f"\n{progress}") is (name in {case.op for case in CASES})


def test_no_op_is_forgotten():
    variants = {"rotary_one", "swiglu_joined", "geglu_joined"}
    of_several_processes = {"vocab_parallel_linear_cross_entropy"}
    assert {case.op for case in CASES} == set(ops.__all__) - variants - of_several_processes


@each_case
def test_stock_computes_what_the_op_does(case, device):
    torch.manual_seed(0)
    with device:
        inputs = case.inputs(*case.tiny)
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    results = []
    for function in (case.stock, case.liger):
        outputs = bench_module._outputs(function, inputs)
        gradients = torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
        results.append([*outputs, *gradients])
    for stock, ours in zip(*results, strict=True):
        assert relative_error(ours, stock.double()) < 0.02


def test_what_fails_is_a_finding_and_the_others_go_on(monkeypatch, llama, document, run):
    (swiglu,) = (case for case in CASES if case.op == "swiglu")

    def fails(gate, up):
        raise RuntimeError("no such\nkernel")

    def too_large(gate, up):
        raise torch.OutOfMemoryError("CUDA out of memory")

    changed = {"stock": too_large, "liger": fails}
    monkeypatch.setattr(bench_module, "CASES", (type(swiglu)(**{**vars(swiglu), **changed}), CASES[0]))
    monkeypatch.setattr(bench_module, "training_step", lambda *_: fails(0, 0))
    status, found = document("bench", "--tiny")
    assert status == 1
    first, second = found["ops"]
    assert first["ways"]["eager"] == {"out_of_memory": True}
    assert first["ways"]["liger"] == {"failed": "RuntimeError: no such kernel"}
    assert first["speedup"] is None
    assert second["speedup"] > 0
    assert found["step"] == {"failed": "RuntimeError: no such kernel"}
    _, page, _ = run("bench", "--tiny")
    assert "swiglu liger failed: RuntimeError: no such kernel" in page
    assert "out of memory" in page
    assert "No training step: RuntimeError: no such kernel" in page


def test_out_of_memory_alone_is_no_failure(monkeypatch, llama, document):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench_module, "training_step", too_large)
    status, found = document("bench", "--tiny", "--only", "step")
    assert status == 0
    assert found["ops"] == []
    assert "too little" in found["step"]["skipped"]


def test_a_family_that_is_not_installed_is_no_failure(install, document):
    install()
    status, found = document("bench", "--tiny", "--only", "step")
    assert status == 0
    assert "none of the adapters" in found["step"]["skipped"]


def test_without_a_gpu_it_refuses(llama, run, monkeypatch):
    monkeypatch.setattr(bench_module, "why_no_gpu", lambda: "no GPU: not here")
    status, out, err = run("bench")
    assert (status, out) == (2, "")
    assert "bench measures the kernels on a GPU: no GPU: not here" in err


def test_with_kernels_switched_off_it_refuses(llama, run, monkeypatch):
    monkeypatch.setattr(bench_module, "why_no_gpu", lambda: None)
    monkeypatch.setattr(launch, "enabled", False)
    status, out, err = run("bench")
    assert (status, out) == (2, "")
    assert "LIGER_DISABLE is set" in err


def test_an_unknown_name_exits_with_2(run):
    status, _, err = run("bench", "--only", "softmax")
    assert status == 2
    assert "no softmax; there are rms_norm, " in err


def test_the_largest_model_that_fits_is_trained(monkeypatch, device):
    tried = []

    def step(model_type, setting, device):
        tried.append(setting)
        if len(tried) < 2:
            raise torch.OutOfMemoryError("fragmented")
        return {"ways": {"eager": {"ms": 3.0}, "liger": {"ms": 2.0}}}

    monkeypatch.setattr(bench_module, "training_step", step)
    monkeypatch.setattr(bench_module, "family", lambda: "llama")
    monkeypatch.setattr(bench_module, "_forget", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 2**30, 80 * 2**30))
    assert bench_module._step(torch.device("cuda"), tiny=False)["speedup"] == 1.5
    assert tried == list(SETTINGS[1:3])


def test_after_its_seconds_it_begins_no_further_shape(monkeypatch):
    done = {"ways": {way: {"out_of_memory": True} for way in ("eager", "compile", "liger")}, "speedup": None}
    monkeypatch.setattr(bench_module, "_op", lambda case, shape, *_: {"op": case.op, "shape": list(shape), **done})
    monkeypatch.setattr(bench_module, "why_no_gpu", lambda: None)
    monkeypatch.setattr(bench_module, "ops_run", lambda: SimpleNamespace(what="kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    ops = [case.op for case in CASES]
    more = [f"{case.op} {bench_module._title(shape)}" for case in CASES for shape in case.shapes[1:]]
    hurried = bench(only=ops, seconds=-1).data
    assert [op["op"] for op in hurried["ops"]] == ops
    assert hurried["left_out"] == more
    assert more
    patient = bench(only=ops, seconds=60).data
    assert [(op["op"], tuple(op["shape"])) for op in patient["ops"]] == [
        (case.op, shape) for case in CASES for shape in case.shapes
    ]
    assert patient["left_out"] == []


def test_settings_are_sorted_and_can_be_built():
    assert [setting.gib for setting in SETTINGS] == sorted((s.gib for s in SETTINGS), reverse=True)
    for setting in (*SETTINGS, TINY):
        assert setting.hidden % setting.heads == 0
        assert setting.heads % setting.kv_heads == 0


@pytest.mark.gpu
def test_on_a_gpu_it_compiles_and_measures_memory(llama):
    found = bench(only=["rms_norm"], tiny=False).data
    for op in found["ops"]:
        assert all(way["ms"] > 0 and way["peak_mib"] > 0 for way in op["ways"].values()), op
        assert op["speedup"] > 1


@pytest.mark.gpu
def test_on_a_gpu_a_patched_step_takes_less_memory(llama, device):
    setting = Setting("", 2, 2, 512, 2048, 8, 4, 32000, batch=1, sequence=1024, steps=2)
    ways = training_step("llama", setting, device)["ways"]
    assert 0 < ways["liger"]["peak_gib"] < ways["eager"]["peak_gib"]


def test_the_families_are_model_types():
    from transformers import CONFIG_MAPPING

    assert set(FAMILIES) <= set(CONFIG_MAPPING.keys())
