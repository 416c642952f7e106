"""The sweep: what it measures and what it skips, and what README makes of all training runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from environment_of_references import REFERENCES
from soak_marks import mark

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_interpreter")


def never():
    return time.monotonic() + 1e6


def sweep_job(group=None, way="liger", deadline=None):
    from benchmarks.sweep import Job
    from benchmarks.sweep_plan import Group

    group = group or Group("llama-1b", False, ((1, 16), (2, 16), (4, 16), (8, 16)))
    return Job(group, way, CPU, deadline or never(), tiny=True)


@pytest.fixture
def small_memory(monkeypatch):
    """A GPU that has room for 40 tokens: the batches that it was asked for, and "recover"."""
    from benchmarks import sweep

    asked = []

    class Training:
        def __init__(self, *args, **options):
            self.recovered = True

        def tokens(self, batch, sequence):
            asked.append((batch, sequence))
            return batch * sequence

        def seconds(self, tokens, steps):
            assert self.recovered, "what the step before left is still there"
            if tokens > 40:
                self.recovered = False
                raise torch.OutOfMemoryError("CUDA out of memory")
            if tokens == 13:
                raise RuntimeError("a kernel is broken")
            return 0.5 * steps

        def record(self, tokens, steps):
            return {"tokens_per_second": 2.0 * tokens, "peak_gib": tokens / 10, "steps": steps}

        def recover(self):
            self.recovered = True
            asked.append("recover")

    monkeypatch.setattr(sweep, "Training", Training)
    return asked


def test_after_out_of_memory_no_larger_size_is_tried(small_memory):
    from benchmarks.sweep import measure

    reported = []
    measure(sweep_job(), reported.append)
    assert [(r["batch"], r.get("tokens_per_second"), r.get("out_of_memory")) for r in reported] == [
        (1, 32.0, None), (2, 64.0, None), (4, None, True), (8, None, True),
    ]  # fmt: skip
    assert small_memory == [(1, 16), "recover", (2, 16), "recover", (4, 16), "recover"]
    assert reported[0]["steps"] == 3, "a second and a half of steps of half a second"


def test_after_another_failure_the_rest_is_left(small_memory):
    from benchmarks.sweep import measure
    from benchmarks.sweep_plan import Group

    reported = []
    measure(sweep_job(Group("llama-1b", False, ((1, 13), (1, 16)))), reported.append)
    assert reported == [{"batch": 1, "sequence": 13, "failed": "RuntimeError: a kernel is broken"}]


def test_the_longest_sequence_is_found_and_nothing_said_when_time_is_up(small_memory, monkeypatch):
    from benchmarks import sweep
    from benchmarks.sweep_plan import Group

    group = Group("llama-1b", False, ((1, 8), (1, 16)), ways=("liger",), longest=True)
    monkeypatch.setattr(sweep, "TINY_LADDER", (16, 24, 32, 48, 64, 72, 80))
    reported = []
    sweep.measure(sweep_job(group), reported.append)
    assert reported == [{"longest": {"tokens": 32, "or_more": False}}]

    sweep.measure(sweep_job(group, deadline=time.monotonic()), reported.append)
    sweep.measure(sweep_job(deadline=time.monotonic()), reported.append)
    assert len(reported) == 1

    monkeypatch.setattr(sweep, "TINY_LADDER", (13,))
    sweep.measure(sweep_job(group), reported.append)
    assert reported[1:] == [{"longest": {"failed": "RuntimeError: a kernel is broken"}}]


def test_the_longest_is_found_from_any_guess_and_in_two_trials_from_a_good_one():
    from benchmarks.sweep import longest

    ladder = list(range(10, 22))
    for limit in range(9, 23):
        for guess in range(len(ladder)):
            tried = []
            found = longest(lambda rung: tried.append(rung) or rung <= limit, ladder, guess)  # noqa: B023
            assert found == (min(limit, 21) if limit >= 10 else None)
            assert len(set(tried)) == len(tried) <= 7
            if ladder[guess] == limit:
                assert len(tried) <= 2


def test_results_keep_what_was_measured_before_a_process_died():
    from benchmarks.sweep import enter, lacking

    results, job = [], sweep_job()
    assert len(lacking(results, job)) == 4
    assert results == [], "asking measures nothing"
    enter(results, job, {"batch": 2, "sequence": 16, "tokens_per_second": 5.0, "peak_gib": 1.0})
    assert lacking(results, job) == [f"llama-1b: liger {batch}×16" for batch in (1, 4, 8)]
    enter(results, job, {"failed": "the process ended with exit code -9"})
    assert lacking(results, job) == []
    (group,) = results
    assert [row["batch"] for row in group["rows"]] == [1, 2, 4, 8]
    assert [*group["rows"][1]["ways"]["liger"]] == ["tokens_per_second", "peak_gib"]
    assert "failed" in group["rows"][0]["ways"]["liger"]


def test_plans_grow_and_name_each_thing_once():
    from benchmarks.sweep_plan import PLANS, plan

    assert plan(79.1) is PLANS[75]
    assert plan(139.8) is PLANS[130]
    assert plan(24) is PLANS[75]
    for groups in PLANS.values():
        planned = [(g.name, way, size, g.longest) for g in groups for way in g.ways for size in g.sizes]
        assert len(set(planned)) == len(planned)
        for group in groups:
            tokens = [batch * sequence for batch, sequence in group.sizes]
            assert tokens == sorted(tokens)
            assert all(0 < group.seconds(way) < 60 for way in group.ways), f"{group.name} takes too long"


@pytest.mark.parametrize("name", ["mistral-7b", "qwen3-8b", "phi3-mini"])
def test_every_shape_that_is_swept_trains(name):
    from benchmarks.models import SHAPES
    from benchmarks.training import Training

    training = Training(SHAPES[name], "liger", CPU, checkpointing=True, tiny=True)
    assert training.seconds(training.tokens(1, 16), 1) > 0
    training.recover()
    assert training.record(training.tokens(2, 8), 1)["tokens_per_second"] > 0


def test_a_shapes_parameters_are_those_of_the_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.models import SHAPES

    for shape in (SHAPES["llama-1b"], SHAPES["gemma2-2b"]):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.family, **shape.config))
        assert shape.parameters == pytest.approx(model.num_parameters(), rel=1e-3)


WORKERS = """
import os, time

def work(job, report):
    report({"pid": os.getpid(), "at": time.monotonic()})
    if job == "dies":
        os._exit(3)
    if job == "hangs":
        time.sleep(100)
    report({"done": job})
"""


def test_processes_report_die_and_are_killed_when_time_is_up(tmp_path, monkeypatch):
    from benchmarks.processes import reports

    (tmp_path / "workers_of_a_test.py").write_text(WORKERS, "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    from workers_of_a_test import work

    began = time.monotonic()
    jobs = iter(["works", "dies", "hangs", "never comes"])
    found = list(reports(work, jobs, began + 8, imports=()))
    assert time.monotonic() - began < 20
    pids = {job: report["pid"] for job, report in found if "pid" in report}
    assert [*pids] == ["works", "dies", "hangs"]
    assert len(set(pids.values())) == 3, "each job has a process of its own"
    assert [(job, report) for job, report in found if "pid" not in report] == [
        ("works", {"done": "works"}), ("dies", {"failed": "the process ended with exit code 3"}),
    ]  # fmt: skip
    with pytest.raises(ProcessLookupError):
        os.kill(pids["hangs"], 0)
    assert next(jobs) == "never comes"


def test_a_tiny_sweep_is_written_skips_what_there_is_no_time_for_and_goes_on_from_there(tmp_path, monkeypatch, capsys):
    from benchmarks import sweep
    from benchmarks.plot import pictures
    from benchmarks.table import section

    file = tmp_path / "tiny.json"
    llama = ["--tiny", "--device", "cpu", "--json", str(file), "--model", "llama-1b", "--way", "liger"]
    command = [sys.executable, "-m", "benchmarks.sweep", *llama]
    subprocess.run(command, cwd=ROOT, env=REFERENCES, check=True, capture_output=True, timeout=200)
    results = json.loads(file.read_text("utf-8"))
    (group,) = results["sweep"]
    assert [(row["batch"], row["sequence"]) for row in group["rows"]] == [(1, 16), (2, 16)]
    assert all(row["ways"]["liger"]["tokens_per_second"] > 0 for row in group["rows"]), group
    assert group["longest"] == {"liger": {"tokens": 24, "or_more": True}}
    assert results["skipped"] == []

    monkeypatch.setattr(sys, "argv", ["sweep", *llama, "--way", "eager", "--add", "--seconds", "0"])
    sweep.main()
    skipped = ["llama-1b: eager 1×16", "llama-1b: eager 2×16"]
    results = json.loads(file.read_text("utf-8"))
    assert results["sweep"] == [group]
    assert results["skipped"] == skipped
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("skipped")] == [f"skipped  {what}" for what in skipped]

    for row in group["rows"]:
        row["ways"]["liger"]["peak_gib"] = 1.0  # which only a GPU's allocator tells
    assert "| Llama 1B shape" in section({**results, "sweep": [group]})
    assert [path.name for path in pictures(file)] == ["tiny-llama-1b.png"]


def test_the_tables_show_ratios_missing_memory_and_open_ends():
    from benchmarks.table import section

    ours, theirs = {"tokens_per_second": 6000.0, "peak_gib": 12.0}, {"tokens_per_second": 4000.0, "peak_gib": 48.0}
    rows = [
        {"batch": 1, "sequence": 4096, "ways": {"liger": ours, "eager": theirs, "liger-kernel": {"failed": "x"}}},
        {"batch": 2, "sequence": 4096, "ways": {"liger": ours, "eager": {"out_of_memory": True}}},
    ]
    longest = {"liger": {"tokens": 98304, "or_more": True}, "eager": {"tokens": 6144, "or_more": False}}
    sweep = [
        {"name": "a", "title": "A", "rows": rows, "longest": {}},
        {"name": "b", "title": "B", "rows": [], "longest": longest},
        {"name": "c", "title": "C", "rows": [], "longest": {"liger": {"tokens": None, "or_more": False}}},
    ]
    machine = {"device": "A GPU", "versions": {"torch": "2.0"}}
    shown = section({**machine, "sweep": sweep, "skipped": ["d: liger 1×16"]})
    assert "| A | 1×4096 | 4,000 / 48.0 | 6,000 / 12.0 | fails | 1.50× / 0.25× | – |" in shown
    assert "|  | 2×4096 | OOM | 6,000 / 12.0 | – | – | – |" in shown
    assert "| B | 6,144 | ≥ 98,304 |" in shown
    assert "| C | – | none |" in shown

    figures = {"final_difference": 0.001, "final_spread": 0.01, "curve_difference": 0.002, "curve_spread": 0.02}
    final = {"stock": 4.0, "patched": 4.001, "seed 1": 4.01, "seed 2": 4.0}
    done = {"runs": {name: {"losses": [4.0] * 30} for name in final}, "final": final, **figures}
    off = {**done, "curve_difference": 0.03}
    shown = section({**machine, "convergence": {"llama": done, "phi3": off, "qwen3": {"runs": {}}}})
    assert "| llama | 30 | 4.0000 | 4.0010 | 4.0100, 4.0000 | 0.0010 / 0.0020 | 0.0100 / 0.0200 | yes |" in shown
    assert "0.0010 / 0.0300 | 0.0100 / 0.0200 | no |" in shown
    assert "| qwen3 (not finished) | – |" in shown

    looked = [mark(step) for step in (100, 200, 300, 400)]
    shown = section({**machine, "soak": {"marks": looked, "complaints": []}})
    assert "400 steps" in shown
    assert "reserved 900, 900, 900 MiB" in shown
    assert "Wrong: it leaks." in section({**machine, "soak": {"marks": looked, "complaints": ["it leaks"]}})
