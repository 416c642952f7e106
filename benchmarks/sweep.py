"""Tokens per second and memory of whole training steps, against batch × sequence until memory runs out.

    python -m benchmarks.sweep --seconds 480 --json benchmarks/results/h100-sweep.json

Each model is trained in each way in a process of its own, which builds it once and goes from size to size. The longest
sequence that fits with batch 1 is found by single steps, in powers of two and ¾ of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import sweep_plan
from benchmarks.models import SHAPES
from benchmarks.processes import Report, reports
from benchmarks.results_file import device_name, earlier, versions, write
from benchmarks.sweep_plan import Group, Size
from benchmarks.training import WAYS, Record, Training, absent

OUT_OF_MEMORY: Record = {"out_of_memory": True}
TINY_LADDER = (8, 12, 16, 24)


@dataclass(frozen=True)
class Job:
    """What one process does: a group in one way, on a device, until a time (of `time.monotonic`)."""

    group: Group
    way: str
    device: torch.device
    deadline: float
    tiny: bool


def measure(job: Job, report: Callable[[Report], None]) -> None:
    """One process's work: each size until memory or time runs out, or the longest sequence."""
    shape = job.group.shape
    missing = absent(shape, job.way)
    if missing:
        return report({"not_installed": missing})
    try:
        training = Training(shape, job.way, job.device, checkpointing=job.group.checkpointing, tiny=job.tiny)
    except Exception as error:
        return report(_failure(error))
    return _longest(training, job, report) if job.group.longest else _sizes(training, job, report)


def _failure(error: Exception) -> Record:
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "ALLOC_FAILED" in text:
        return OUT_OF_MEMORY
    return {"failed": f"{type(error).__name__}: {text}"[:500]}


def _sizes(training: Training, job: Job, report: Callable[[Report], None]) -> None:
    record: Record = {}
    for batch, sequence in job.group.sizes:
        if record != OUT_OF_MEMORY:
            if time.monotonic() + sweep_plan.size_seconds(job.group, (batch, sequence)) > job.deadline:
                return
            record = _size(training, (batch, sequence), first=not record)
            training.recover()
        report({"batch": batch, "sequence": sequence, **record})
        if "failed" in record:
            return


def _size(training: Training, size: Size, first: bool) -> Record:
    try:
        tokens = training.tokens(*size)
        if first:  # kernels are compiled, the optimizer's state is made
            training.seconds(tokens, 1)
        each = training.seconds(tokens, sweep_plan.WARM_UP) / sweep_plan.WARM_UP
        return training.record(tokens, sweep_plan.counted_steps(each))
    except Exception as error:
        return _failure(error)


def _longest(training: Training, job: Job, report: Callable[[Report], None]) -> None:
    ladder = TINY_LADDER if job.tiny else job.group.ladder

    def fits(sequence: int) -> bool:
        if time.monotonic() + sweep_plan.step_seconds(job.group, (1, sequence)) > job.deadline:
            raise TimeoutError
        record = _step(training, sequence)
        training.recover()
        if "failed" in record:
            raise RuntimeError(record["failed"])
        return record != OUT_OF_MEMORY

    peaks = {size: _size(training, size, first=True) for size in job.group.sizes}
    try:
        found = longest(fits, ladder, _guess(peaks, ladder, job.device))
    except TimeoutError:
        return
    except RuntimeError as error:
        report({"longest": {"failed": str(error)}})
    else:
        report({"longest": {"tokens": found, "or_more": found == ladder[-1]}})


def _step(training: Training, sequence: int) -> Record:
    try:
        training.seconds(training.tokens(1, sequence), 1)
    except Exception as error:
        return _failure(error)
    return {}


def _guess(peaks: dict[Size, Record], ladder: Sequence[int], device: torch.device) -> int:
    """The place in the ladder of the longest sequence that should fit, if memory grows as between two sizes."""
    if device.type != "cuda" or any("peak_gib" not in record for record in peaks.values()):
        return len(ladder) // 2
    (few, less), (many, more) = [(sequence, record["peak_gib"]) for (_, sequence), record in peaks.items()]
    free = 0.97 * torch.cuda.get_device_properties(device).total_memory / 2**30 - more
    most = many + free / max((more - less) / (many - few), 1e-9)
    return max(sum(rung <= most for rung in ladder) - 1, 0)


def longest(fits: Callable[[int], bool], ladder: Sequence[int], guess: int) -> int | None:
    """The largest rung that fits, with few trials where `guess` is near its place; None where the first does not."""
    fitting, too_long = -1, len(ladder)
    at, stride = guess, 1
    while too_long - fitting > 1:
        if fits(ladder[at]):
            fitting, at = at, at + stride
        else:
            too_long, at = at, at - stride
        stride *= 2
        if not fitting < at < too_long:
            at = (fitting + too_long) // 2
    return ladder[fitting] if fitting >= 0 else None


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=480, help="what does not fit into these is skipped")
    parser.add_argument("--json", type=Path, help="write every figure to this file, after each")
    parser.add_argument("--add", action="store_true", help="measure only what the file lacks; the same machine's only")
    parser.add_argument("--model", action="append", choices=list(SHAPES), help="may be repeated; all without")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="may be repeated; all without it")
    parser.add_argument("--plan", type=float, metavar="GIB", help="only print what a GPU of that memory would measure")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the program runs, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def _entry(results: list[Record], group: Group) -> Record | None:
    return next((found for found in results if found["name"] == group.name), None)


def _ways(entry: Record | None, size: Size) -> dict[str, Record] | None:
    rows = entry["rows"] if entry else []
    return next((row["ways"] for row in rows if (row["batch"], row["sequence"]) == size), None)


def _put(entry: Record, size: Size, way: str, record: Record) -> None:
    if _ways(entry, size) is None:
        entry["rows"].append({"batch": size[0], "sequence": size[1], "ways": {}})
        entry["rows"].sort(key=lambda row: (row["batch"] * row["sequence"], row["sequence"]))
    _ways(entry, size)[way] = record  # type: ignore[index]


def enter(results: list[Record], job: Job, report: Report) -> None:
    """Put into `results` what a process reported. What it says of no size holds for each that has nothing yet."""
    entry = _entry(results, job.group)
    if entry is None:
        title = f"{job.group.shape.title}{', checkpointing' if job.group.checkpointing else ''}"
        entry = {"name": job.group.name, "title": title, "rows": [], "longest": {}}
        results.append(entry)
    if "batch" in report:
        record = {key: value for key, value in report.items() if key not in ("batch", "sequence")}
        _put(entry, (report["batch"], report["sequence"]), job.way, record)
    elif job.group.longest:
        entry["longest"].setdefault(job.way, report.get("longest", report))
    else:
        for size in _missing(results, job):
            _put(entry, size, job.way, report)


def _missing(results: list[Record], job: Job) -> list[Size]:
    entry = _entry(results, job.group)
    return [size for size in job.group.sizes if job.way not in (_ways(entry, size) or {})]


def lacking(results: list[Record], job: Job) -> list[str]:
    """What of a job is not in `results`."""
    title = f"{job.group.name}: {job.way}"
    if job.group.longest:
        entry = _entry(results, job.group)
        return [] if entry and job.way in entry["longest"] else [f"{title} longest sequence"]
    return [f"{title} {batch}×{sequence}" for batch, sequence in _missing(results, job)]


def _print_plan(jobs: list[Job]) -> None:
    total = 0.0
    for job in jobs:
        seconds = job.group.seconds(job.way)
        total += seconds
        sizes = " ".join(f"{batch}×{sequence}" for batch, sequence in job.group.sizes)
        what = f"longest sequence, up to {job.group.ladder[-1]}" if job.group.longest else sizes
        print(f"{total:6.0f} s  {job.group.name:<26} {job.way:<14} at most {seconds:3.0f} s: {what}")


def _in_time(jobs: list[Job]) -> Iterator[Job]:
    for job in jobs:
        shortest = sweep_plan.START * (not job.tiny) + sweep_plan.size_seconds(job.group, job.group.sizes[0])
        if time.monotonic() + shortest <= job.deadline:
            yield job


def main() -> None:
    """Measure until the time is up."""
    began = time.monotonic()
    options = _arguments()
    device = torch.device(options.device)
    deadline = began + options.seconds
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0.0
    groups = sweep_plan.TINY if options.tiny else sweep_plan.plan(options.plan or gib)
    everything = [
        Job(group, way, device, deadline, options.tiny)
        for group in groups
        if not options.model or group.model in options.model
        for way in group.ways
        if not options.way or way in options.way
    ]
    results: dict[str, Any] = {"device": device_name(device), "versions": versions(), "sweep": [], "skipped": []}
    if options.add and options.json:
        results["sweep"] = earlier(options.json, results["device"]).get("sweep", [])
    sweep = results["sweep"]
    jobs = [job for job in everything if lacking(sweep, job)]
    _print_plan(jobs)
    if options.plan:
        return

    def save() -> None:
        results["skipped"] = [line for job in everything for line in lacking(sweep, job)]
        if options.json:
            write(options.json, results)

    for job, report in reports(measure, _in_time(jobs), deadline):
        enter(sweep, job, report)
        print(f"{time.monotonic() - began:5.0f} s  {job.group.name:<26} {job.way:<14} {report}", flush=True)
        save()
    save()
    for line in results["skipped"]:
        print(f"skipped  {line}")
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
