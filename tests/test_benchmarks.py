"""The benchmarks run, fail where it is seen, and README shows what they measured."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from environment_of_references import REFERENCES

ROOT = Path(__file__).parent.parent


def test_a_tiny_run_measures_every_op(tmp_path):
    file = tmp_path / "tiny.json"
    command = [sys.executable, "-m", "benchmarks", "--tiny", "--device", "cpu", "--json", str(file)]
    for peer in ("eager", "liger"):
        command += ["--peer", peer]
    subprocess.run(command, cwd=ROOT, env=REFERENCES, check=True, capture_output=True, timeout=300)
    results = json.loads(file.read_text("utf-8"))

    from benchmarks.cases import CASES

    assert [case["op"] for case in results["cases"]] == list(dict.fromkeys(case.op for case in CASES))
    for case in results["cases"]:
        eager, ours = (case["peers"][name] for name in ("eager", "liger"))
        assert "failed" not in eager, f"{case['op']}: {eager}"
        assert "failed" not in ours, f"{case['op']}: {ours}"
        assert ours["host_us"] > 0
        assert ours["error"].keys() == eager["error"].keys()
        for what, error in ours["error"].items():
            assert error <= 1.5 * eager["error"][what] + 1e-6, f"{case['op']}, {what}: {error} against {eager['error']}"


def test_every_case_has_a_positive_floor_and_its_peers_in_order():
    from benchmarks.cases import CASES
    from benchmarks.peers import NAMES

    for case in CASES:
        assert (case.moved > 0) != (case.flops > 0), f"{case.op}: bound by memory or by operations"
        assert list(case.peers) == [name for name in NAMES if name in case.peers]
        assert {"eager", "compile", "liger"} <= case.peers.keys()
        assert case.peers.keys() & {"liger-kernel", "trl"}, f"{case.op}: what its users would install"


def test_cases_are_chosen_by_op_and_shape():
    from benchmarks.__main__ import _selected

    def shapes(op, **options):
        asked = argparse.Namespace(
            **{"op": [op], "shape": None, "all": False, "quick": False, "tiny": False, **options}
        )
        return [case.shape for case in _selected(asked)]

    assert shapes("swiglu") == ["8192×14336"]
    assert shapes("layer_norm", quick=True) == ["16384×2560"]
    assert shapes("layer_norm") == ["16384×2560", "16384×4096"]
    assert shapes("layer_norm", all=True) == ["16384×2560", "16384×4096", "4096×16384"]
    assert shapes("layer_norm", shape=["4096×16384"]) == ["4096×16384"]
    assert shapes("experts") == []


def test_absent_peers_are_named(monkeypatch):
    from benchmarks import peers

    monkeypatch.setattr(peers, "find_spec", lambda name: None if name in ("cutlass", "quack") else name)
    assert peers.not_installed() == ["liger-kernel-cutedsl", "quack-kernels"]


def test_shapes_beyond_the_table_come_after_those_of_it():
    from benchmarks.cases import CASES

    for op in {case.op for case in CASES}:
        more = [case.more for case in CASES if case.op == op]
        assert not more[0]
        assert more == sorted(more)


def test_a_peer_that_fails_is_recorded_with_its_error():
    from benchmarks.cases import CASES
    from benchmarks.measure import measure_or_say_why

    def load():
        raise RuntimeError("no such kernel")

    case = CASES[0]
    case.peers["broken"] = load
    try:
        record = measure_or_say_why(case, "broken", torch.device("cpu"))
    finally:
        del case.peers["broken"]
    assert record == {"failed": "RuntimeError: no such kernel"}


def test_errors_are_measured_in_stretches_as_in_one_piece():
    import dataclasses

    from benchmarks.cases import CASES
    from benchmarks.measure import _errors

    def loss(input, linear_weight, target):
        return torch.nn.functional.cross_entropy(input @ linear_weight.T, target)

    case = next(case for case in CASES if case.op == "linear_cross_entropy")
    case = dataclasses.replace(case, sizes=case.tiny)
    whole, stretches = (_errors(loss, dataclasses.replace(case, chunk=rows), torch.device("cpu")) for rows in (64, 24))
    assert whole == pytest.approx(stretches, rel=1e-6)
    assert 0 < whole["d linear_weight"] < 0.01


def test_readme_shows_the_committed_results():
    from benchmarks.table import ALL, everything, updated

    readme = (ROOT / "README.md").read_text("utf-8")
    assert readme == updated(readme), "README's tables are stale: python -m benchmarks.table --write"
    assert ALL.read_text("utf-8") == everything(), "the results' tables are stale: python -m benchmarks.table --write"


def test_the_tables_show_failures_and_absent_peers():
    from benchmarks.table import section

    record = {"gpu_ms": 1.25, "peak_mib": 1234.0, "host_us": 77.7}
    figures = {"gpu_ms": 31.25, "gate_ms": 0.5, "peak_mib": 1234.0}
    peers = {"eager": record, "compile": {"failed": "RuntimeError: x"}}
    shown = section({
        "device": "A GPU",
        "versions": {"torch": "2.0"},
        "not_installed": ["quack-kernels"],
        "cases": [
            {"op": "cross_entropy", "shape": "2×3", "floor_ms": 0.5, "peers": peers},
            {"op": "swiglu", "shape": "2×3", "floor_ms": 0.5, "peers": {"eager": record, "liger": record}},
        ],
        "experts": [
            {"model": "A", "shape": "8 experts", "grouped_mm": figures, "grouped_mm + liger": figures},
            {"model": "B", "shape": "9 experts", "not_installed": "liger-b"},
            {"model": "C", "shape": "7 experts", "failed": "RuntimeError: x"},
        ],
        "losses": [
            {"loss": "DPO", "shape": "4 pairs", "logits": {"failed": "OutOfMemoryError: x"}, "liger": record},
            {"loss": "KTO", "shape": "4 pairs", "logits": record, "liger": record},
        ],
        "steps": {
            "llama-1b": {
                "title": "Llama",
                "ways": {
                    "eager": {"tokens_per_second": 45938.0, "peak_gib": 61.2},
                    "liger": {"not_installed": "liger-llama"},
                    "compile": {"failed": "x"},
                },
            },
        },
    })  # fmt: skip
    assert "torch 2.0. Not installed: quack-kernels." in shown
    assert "| cross_entropy | 2×3 | 0.500 | 1.250 / 1,234 | fails | – |" in shown
    assert "| swiglu | 2×3 | 0.500 | 1.250 | – | 1.250 |" in shown
    assert "| A: 8 experts | 31.25 | 31.25 | 0.500 | 0.500 | 1,234 | 1,234 |" in shown
    assert "| B: 9 experts (without liger-b) | – |" in shown
    assert "| C: 7 experts (fails) | – |" in shown
    assert "| DPO | 4 pairs | fails | 1.250 | fails | 1,234 |" in shown
    assert "| KTO | 4 pairs | 1.250 | 1.250 | 1,234 | 1,234 |" in shown
    assert "| model | eager | compile | liger |" in shown
    assert "| Llama | 45,938 / 61.2 | fails | – |" in shown


def test_a_result_file_becomes_a_picture_per_op(tmp_path):
    from benchmarks.plot import pictures

    record = {"gpu_ms": 1.25, "peak_mib": 1234.0}
    peers = {"eager": {"gpu_ms": 90.0, "peak_mib": 9.0}, "compile": {"failed": "RuntimeError: x"}, "liger": record}
    cases = [
        {"op": op, "shape": shape, "floor_ms": 0.5, "peers": peers}
        for op in ("rms_norm", "linear_cross_entropy")
        for shape in ("2×3", "4×5")
    ]
    file = tmp_path / "h100.json"
    file.write_text(json.dumps({"device": "A GPU", "cases": cases}), "utf-8")
    assert [path.name for path in pictures(file)] == ["h100-rms_norm.png", "h100-linear_cross_entropy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_experts_run_stock_and_ours(monkeypatch):
    from benchmarks.experts import OURS, STOCK, all_experts

    monkeypatch.setattr("liger.ops.launch.enabled", False)
    saved = []
    results = all_experts(torch.device("cpu"), tiny=True, save=lambda so_far: saved.append(len(so_far)))
    assert saved == [1, 2]
    for layer in results:
        assert layer[STOCK]["wall_ms"] > 0, layer
        assert layer[OURS]["wall_ms"] > 0, layer
        assert 0 < layer["difference"] < 0.01, "another rounding of the same formulas, so something was swapped"


def test_losses_run_from_the_logits_and_fused_and_give_the_same(monkeypatch):
    from benchmarks import losses
    from liger.testing.error_rule import relative_error

    monkeypatch.setattr("liger.ops.launch.enabled", False)
    saved = []
    results = losses.all_losses(torch.device("cpu"), tiny=True, save=lambda so_far: saved.append(len(so_far)))
    assert [measured["loss"] for measured in results] == list(losses.LOSSES)
    assert saved == [*range(1, len(losses.LOSSES) + 1)]
    for measured in results:
        assert measured[losses.NAIVE].get("wall_ms", 0) > 0, measured
        assert measured[losses.OURS].get("wall_ms", 0) > 0, measured

    batch = losses.Batch(losses.TINY, torch.device("cpu"))
    for name, ways in losses.LOSSES.items():
        for ours, naive in zip(*(losses._step(way, batch) for way in reversed(ways)), strict=True):
            assert relative_error(ours, naive) < 0.01, f"{name}: two roundings of the same formula"


def test_a_loss_that_fails_is_recorded_with_its_error(monkeypatch):
    from benchmarks import losses

    def no_memory(batch):
        raise MemoryError("the logits")

    monkeypatch.setattr(losses, "LOSSES", {"DPO": (no_memory, losses.LOSSES["DPO"][1])})
    monkeypatch.setattr("liger.ops.launch.enabled", False)
    (measured,) = losses.all_losses(torch.device("cpu"), tiny=True)
    assert measured[losses.NAIVE] == {"failed": "MemoryError: the logits"}
    assert measured[losses.OURS]["wall_ms"] > 0


def test_steps_name_what_is_not_installed_and_leave_liger_kernel_for_the_end(monkeypatch):
    from benchmarks import step, training

    def attempt(model, way, device, tiny):
        done.append(way)
        return {"failed": "not run"}

    done = []
    monkeypatch.setattr(step, "_attempt", attempt)
    names = ["llama-1b", "qwen3-1.7b"]
    results = step.training_steps(torch.device("cpu"), names)
    assert list(results) == names
    assert done[-2:] == ["liger-kernel"] * 2
    assert "liger-kernel" not in done[:-2]

    monkeypatch.undo()
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    assert step._attempt(step.MODELS["gemma2-2b"], "liger", torch.device("cpu"), True) == {
        "not_installed": "liger-gemma"
    }


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("llama-1b", ["eager", "liger, recompute"]), ("qwen3-1.7b", ["liger"]), ("gemma2-2b", ["liger"])],
)
def test_a_tiny_model_takes_steps(name, wanted, monkeypatch):
    from benchmarks.step import training_steps

    monkeypatch.setattr("liger.ops.launch.enabled", False)  # the interpreter takes half a minute
    ways = training_steps(torch.device("cpu"), [name], wanted, tiny=True)[name]["ways"]
    assert [*ways] == wanted
    for way, record in ways.items():
        assert record.get("tokens_per_second", 0) > 0, f"{way}: {record}"


def test_a_run_can_be_added_to_a_file(tmp_path):
    from benchmarks.__main__ import _kept, _with_case
    from benchmarks.cases import CASES

    file = tmp_path / "a.json"
    assert _kept(file, "A GPU") == {}
    file.write_text(
        json.dumps({"device": "A GPU", "cases": [1], "losses": [3], "steps": {"a": 2}, "versions": {}}), "utf-8"
    )
    assert _kept(file, "A GPU") == {"cases": [1], "losses": [3], "steps": {"a": 2}}
    with pytest.raises(SystemExit, match="is of A GPU"):
        _kept(file, "another")

    first, second = ({"op": case.op, "shape": case.shape, "peers": {}} for case in CASES[:2])
    again = {**first, "peers": {"eager": {}}}
    assert _with_case(_with_case([second], first), again) == [again, second]


def test_frequent_classes_are_what_roundings_add_up_in():
    from benchmarks.roundings import errors

    in_bf16, mixed = errors(rows=512, classes=8192, known=0.0, exponent=1.0)
    assert mixed < 1.3 < in_bf16
