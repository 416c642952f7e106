"""`python -m benchmarks`, from the repository's root: see benchmarks/README.md."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, Case
from benchmarks.experts import all_experts
from benchmarks.losses import all_losses
from benchmarks.measure import Record, copy_tb_s, measure_or_say_why, product_tflop_s
from benchmarks.peers import NAMES, not_installed
from benchmarks.results_file import device_name, earlier, versions, write
from benchmarks.step import MODELS, training_steps
from benchmarks.training import WAYS

OPS = tuple(dict.fromkeys(case.op for case in CASES))
SHAPES = tuple(dict.fromkeys(case.shape for case in CASES))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What every op costs, beside its peers.")
    parser.add_argument(
        "--op", action="append", choices=[*OPS, "experts", "losses", "step"], help="may be repeated; all ops without it"
    )
    parser.add_argument(
        "--peer", action="append", choices=list(dict.fromkeys([*NAMES, *WAYS])), help="may be repeated; all without it"
    )
    parser.add_argument("--model", action="append", choices=list(MODELS), help="for --op step; all that fit without it")
    parser.add_argument("--shape", action="append", choices=SHAPES, metavar="M×N", help="may be repeated; see CASES")
    parser.add_argument("--quick", action="store_true", help="each op at its first shape")
    parser.add_argument("--all", action="store_true", help="more shapes than those of the README's table")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the program runs, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="write every figure to this file, after every case")
    parser.add_argument("--add", action="store_true", help="keep what else the file holds; the same machine's only")
    return parser.parse_args()


def _selected(options: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for."""
    cases = [case for case in CASES if not options.op or case.op in options.op]
    if options.shape:
        return [case for case in cases if case.shape in options.shape]
    cases = [case for case in cases if options.all or not case.more]
    if options.quick or options.tiny:
        return [next(case for case in cases if case.op == op) for op in dict.fromkeys(case.op for case in cases)]
    return cases


def _kept(file: Path, device: str) -> dict[str, Any]:
    """What an earlier run wrote there: its cases, experts, losses and steps."""
    found = earlier(file, device)
    return {key: found[key] for key in ("cases", "experts", "losses", "steps") if key in found}


def _with_case(cases: list[Record], case: Record) -> list[Record]:
    """`cases` in the order of CASES, with `case` in the place of what they had of its op and shape."""
    order = [(case.op, case.shape) for case in CASES]
    kept = [other for other in cases if (other["op"], other["shape"]) != (case["op"], case["shape"])]
    known = {key: place for place, key in enumerate(order)}
    return sorted([*kept, case], key=lambda other: known.get((other["op"], other["shape"]), len(order)))


def _floor_ms(case: Case, machine: dict[str, Any]) -> float | None:
    """What the machine could do at best, by the copy and the product measured in this run."""
    if not machine["copy_tb_s"]:
        return None
    if case.flops:
        return float(case.flops / machine["product_tflop_s"] / 1e9)
    return float(case.moved / machine["copy_tb_s"] / 1e9)


def _line(case: Case, name: str, record: Record) -> str:
    title = f"{case.op:<21}{case.shape:<19}{name:<23}"
    if "failed" in record:
        return f"{title} failed: {record['failed'].splitlines()[0]}"
    figures = [
        f"{label} {record[key]:,.{digits}f}"
        for label, key, digits in (
            ("gpu", "gpu_ms", 3), ("forward", "gpu_forward_ms", 3), ("wall", "wall_ms", 3), ("MiB", "peak_mib", 0),
            ("host µs", "host_us", 0),
        )
        if record[key] is not None
    ]  # fmt: skip
    off = ", ".join(f"{what} {error:.2g}" for what, error in record["error"].items())
    return f"{title} {'  '.join(figures)}  error: {off}"


def main() -> None:
    """Measure what the command line asks for."""
    options = _arguments()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    ops = options.op or OPS
    names = [name for name in NAMES if not options.peer or name in options.peer]
    absent = not_installed()
    machine: dict[str, Any] = {
        "device": device_name(device),
        "copy_tb_s": copy_tb_s(device) if on_gpu else None,
        "product_tflop_s": product_tflop_s(device) if on_gpu else None,
        "versions": versions(),
        "not_installed": absent,
    }
    results: dict[str, Any] = {**machine, "cases": [], "experts": [], "losses": [], "steps": {}}
    if options.add and options.json:
        results.update(_kept(options.json, machine["device"]))
    print(*(f"{key}: {value}" for key, value in machine.items()), sep="\n", flush=True)

    def save(**measured: Any) -> None:
        results.update(measured)
        if options.json:
            write(options.json, results)

    began = time.perf_counter()
    for case in _selected(options):
        if options.tiny:
            case = dataclasses.replace(case, sizes=case.tiny)
        measured = {}
        for name in names:
            if name in case.peers and name not in absent:
                measured[name] = measure_or_say_why(case, name, device)
                print(_line(case, name, measured[name]), flush=True)
        floor = None if options.tiny else _floor_ms(case, machine)
        record = {"op": case.op, "shape": case.shape, "floor_ms": floor, "peers": measured}
        save(cases=_with_case(results["cases"], record))
    if "experts" in ops:
        all_experts(device, options.tiny, lambda measured: save(experts=measured))
    if "losses" in ops:
        all_losses(device, options.tiny, lambda measured: save(losses=measured))
    if "step" in ops:
        steps = results["steps"]
        training_steps(device, options.model, options.peer, options.tiny, lambda new: save(steps={**steps, **new}))
    save()
    print(f"{time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
