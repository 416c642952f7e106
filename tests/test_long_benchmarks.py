"""The convergence runs and the soak: what they see, and what they do not take for a difference."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from soak_marks import mark

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_interpreter")


def never():
    return time.monotonic() + 1e6


def test_stock_and_patched_see_the_same_and_another_seed_does_not(tmp_path):
    from benchmarks.convergence import Job, judged, train, within
    from benchmarks.plot import pictures

    reported = []
    train(Job("llama", CPU, never(), tiny=True, other_seeds=2), reported.append)
    entry = {"runs": {report.pop("run"): report for report in reported}}
    assert [*entry["runs"]] == ["stock", "patched", "seed 1", "seed 2"]
    entry.update(judged(entry))
    assert 0 < entry["curve_difference"] < 1e-3, "rounded in another way, and otherwise the same"
    assert entry["curve_spread"] > 10 * entry["curve_difference"]
    assert within(entry)

    file = tmp_path / "curves.json"
    file.write_text(json.dumps({"device": "A GPU", "convergence": {"llama": entry, "phi3": {"runs": {}}}}), "utf-8")
    assert [path.read_bytes()[:4] for path in pictures(file)] == [b"\x89PNG"]


def test_a_run_that_is_cut_short_is_not_judged_and_one_that_drifts_is_not_within():
    from benchmarks.convergence import WITHIN, Job, judged, train, verdict, within

    reported = []
    train(Job("llama", CPU, time.monotonic(), tiny=True), reported.append)
    assert [report["losses"] for report in reported] == [[]]
    assert verdict({"runs": {}}) == "not finished"

    stock = [5 - 0.01 * step for step in range(100)]
    runs = {name: {"losses": stock} for name in ("stock", "patched")}
    assert judged({"runs": runs}) == {}
    runs["seed 1"] = {"losses": [loss + 0.02 for loss in stock]}
    assert within(judged({"runs": runs}))
    assert verdict(judged({"runs": runs})) == WITHIN
    wandering = [loss + 0.05 * math.sin(step) for step, loss in enumerate(stock[:80])] + stock[80:]
    assert not within(judged({"runs": {**runs, "patched": {"losses": wandering}}})), "it ends where stock does"
    higher = [*stock[:80], *(loss + 0.03 for loss in stock[80:])]
    assert verdict(judged({"runs": {**runs, "patched": {"losses": higher}}})) == "NOT within the spread"
    assert judged({"runs": {**runs, "patched": {"losses": stock[:50]}}}) == {}


def test_a_tiny_soak_takes_its_steps():
    from benchmarks.soak import soak

    saved = []
    marks = soak(CPU, steps=9, every=3, tiny=True, save=lambda marks: saved.append(len(marks)))
    assert saved == [1, 2, 3]
    assert [mark["step"] for mark in marks] == [3, 6, 9]
    assert all(mark["finite"] and 0 < mark["loss"] < 10 for mark in marks), marks


def test_a_soak_sees_what_is_not_finite(monkeypatch):
    from benchmarks import soak

    built = soak._built

    def broken(*args):
        model = built(*args)
        torch.nn.init.constant_(model.model.norm.weight, math.nan)
        return model

    monkeypatch.setattr(soak, "_built", broken)
    (seen,) = soak.soak(CPU, steps=2, every=2, tiny=True)
    assert not seen["finite"]


def test_a_soak_complains_of_growth_of_compilation_of_nan_and_of_its_end():
    from benchmarks.soak import complaints

    steps = range(100, 1100, 100)
    assert complaints([mark(step) for step in steps], 1000) == []
    on_a_cpu = {"allocated_mib": None, "reserved_mib": None}
    assert complaints([mark(step, **on_a_cpu) for step in steps], 1000) == []
    for key, a_step in (("allocated_mib", 0.01), ("reserved_mib", 1.0), ("resident_mib", 0.3)):
        growing = [mark(step, **{key: 100 + a_step * step}) for step in steps]
        assert [line.partition(":")[0] for line in complaints(growing, 1000)] == [key]
    assert "variants: 30" in complaints([*(mark(step) for step in steps), mark(1100, variants=31)], 1100)[0]
    assert "step 500" in complaints([mark(step, finite=step != 500) for step in steps], 1000)[0]
    assert complaints([mark(step) for step in steps], 3000) == ["it ended after 1000 of 3000 steps"]
    assert "too few" in complaints([mark(100)], 100)[0]
