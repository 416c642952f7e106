"""The tables of benchmarks/results, from the figures there: `python -m benchmarks.table --write`.

All of them go into benchmarks/results/README.md, and of each GPU the training of whole models and the ops' times into
the README of the project. Without `--write` all are printed. tests/test_benchmarks.py fails when they are stale.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.experts import OURS, STOCK
from benchmarks.losses import NAIVE
from benchmarks.losses import OURS as FUSED
from benchmarks.markdown import head, row
from benchmarks.peers import NAMES
from benchmarks.training import WAYS
from benchmarks.training_tables import convergence, soak, sweep

RESULTS = Path(__file__).parent / "results"
ALL = RESULTS / "README.md"
README = Path(__file__).parent.parent / "README.md"
COMMAND = "python -m benchmarks.table"
BEGIN, END = f"<!-- begin: {COMMAND} -->", "<!-- end -->"


def _ms(time: float) -> str:
    return f"{time:.{3 if time < 10 else 1}f}"


def _time(record: dict[str, Any] | None, with_memory: bool) -> str:
    if record is None:
        return "–"
    if "failed" in record:
        return "fails"
    memory = f" / {record['peak_mib']:,.0f}" if with_memory else ""
    return f"{_ms(record['gpu_ms'])}{memory}"


def _host(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    return "fails" if "failed" in record else f"{record['host_us']:.0f}"


def _ops(results: dict[str, Any], names: list[str]) -> list[str]:
    lines = head(["op", "shape", "floor", *names], words=2)
    for case in results["cases"]:
        with_memory = case["op"] in ("cross_entropy", "linear_cross_entropy", "linear_log_prob")
        times = [_time(case["peers"].get(name), with_memory) for name in names]
        lines.append(row([case["op"], case["shape"], _ms(case["floor_ms"]), *times]))
    return lines


def ops(results: dict[str, Any]) -> list[str]:
    """The paragraphs of the ops' times."""
    names = [name for name in NAMES if any(name in case["peers"] for case in results["cases"])]
    caption = (
        "GPU milliseconds of forward + backward in bf16, for the losses with peak MiB (–: not measured, or no such "
        "kernel). Shapes: rows × columns; of rotary: batch × tokens × heads of q × of k × head dim; of a loss: rows × "
        "classes, or rows × hidden × classes:"
    )
    return [caption, "\n".join(_ops(results, names))]


def _hosts(results: dict[str, Any], names: list[str]) -> list[str]:
    lines = head(["op", *names], words=1)
    first = {case["op"]: case for case in reversed(results["cases"])}
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        lines.append(row([op, *(_host(first[op]["peers"].get(name)) for name in names)]))
    return lines


def _steps(results: dict[str, Any]) -> list[str]:
    models = results["steps"].values()
    ways = [way for way in WAYS if any(way in model["ways"] for model in models)]
    lines = head(["model", *ways], words=1)
    for model in models:
        lines.append(row([model["title"], *(_step(model["ways"].get(way)) for way in ways)]))
    return lines


def _step(record: dict[str, Any] | None) -> str:
    if record is None or "not_installed" in record:
        return "–"
    if "failed" in record:
        return "fails"
    return f"{record['tokens_per_second']:,.0f} / {record['peak_gib']:.1f}"


def _experts(results: dict[str, Any]) -> list[str]:
    figures = {"gpu_ms": "{:.2f}", "gate_ms": "{:.3f}", "peak_mib": "{:,.0f}"}
    names = [f"{what}, {who}" for what in ("all", "activation", "MiB") for who in ("stock", "liger")]
    lines = head(["experts", *names], words=1)
    for layer in results["experts"]:
        measured = STOCK in layer
        cells = [
            form.format(layer[way][key]) if measured else "–" for key, form in figures.items() for way in (STOCK, OURS)
        ]
        reason = "" if measured else " (fails)" if "failed" in layer else f" (without {layer['not_installed']})"
        lines.append(row([f"{layer['model']}: {layer['shape']}{reason}", *cells]))
    return lines


def _losses(results: dict[str, Any]) -> list[str]:
    names = [f"{what}, {way}" for what in ("ms", "MiB") for way in (NAIVE, FUSED)]
    lines = head(["loss", "shape", *names], words=2)
    for loss in results["losses"]:
        records = [loss[way] for way in (NAIVE, FUSED)]
        times = [_time(record, with_memory=False) for record in records]
        memory = ["fails" if "failed" in record else f"{record['peak_mib']:,.0f}" for record in records]
        lines.append(row([loss["loss"], loss["shape"], *times, *memory]))
    return lines


OTHERS = {
    "sweep": ("training at growing sizes", sweep), "convergence": ("convergence", convergence), "soak": ("soak", soak),
}  # fmt: skip
"""The result files of whole models, by the key that they have: the heading, and what makes the paragraphs."""


def section(results: dict[str, Any]) -> str:
    """The tables of one result file."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    for key, (title, paragraphs) in OTHERS.items():
        if key in results:
            return "\n\n".join([f"## {results['device']}: {title}", f"{versions}.", *paragraphs(results)])
    names = [name for name in NAMES if any(name in case["peers"] for case in results["cases"])]
    parts = [f"## {results['device']}: ops and steps", f"{versions}."]
    if results.get("not_installed"):
        parts[-1] += f" Not installed: {', '.join(results['not_installed'])}."
    if results["cases"]:
        parts += [
            *ops(results),
            "Microseconds of host time for forward + backward at tiny sizes:",
            "\n".join(_hosts(results, names)),
        ]
    if results.get("experts"):
        parts += [
            "The experts of one layer, GPU milliseconds of forward + backward with transformers' `grouped_mm`, "
            "their activation alone, and peak MiB:",
            "\n".join(_experts(results)),
        ]
    if results.get("losses"):
        parts += [
            "The losses of alignment and distillation, from a head's input and weight: GPU milliseconds of forward "
            "+ backward and peak MiB, with the whole logits and without:",
            "\n".join(_losses(results)),
        ]
    if results["steps"]:
        parts += [
            "Training steps with fused AdamW in bf16: tokens per second / peak GiB:",
            "\n".join(_steps(results)),
        ]
    return "\n\n".join(parts)


def _results() -> list[dict[str, Any]]:
    return [json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))]


def everything() -> str:
    """The tables of every result file."""
    title = f"# Results\n\nMade from the files beside this one by `{COMMAND} --write`."
    return "\n\n".join([title, *map(section, _results())]) + "\n"


def headline() -> str:
    """The tables of whole models, and those of the ops."""
    parts = []
    for results in _results():
        if "sweep" in results:
            parts += [f"### Training on one {results['device']}", *sweep(results)]
    for results in _results():
        if results.get("cases"):
            parts += [f"### The ops on one {results['device']}", *ops(results)]
    return "\n\n".join(parts)


def updated(readme: str) -> str:
    """`readme` with the present headline between its two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{headline()}\n\n{END}{after}"


def main() -> None:
    """Print the tables, or write them into the two files."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="The tables of the results.")
    parser.add_argument("--write", action="store_true", help="put them into README.md and benchmarks/results/README.md")
    if parser.parse_args().write:
        README.write_text(updated(README.read_text("utf-8")), encoding="utf-8")
        ALL.write_text(everything(), encoding="utf-8")
    else:
        print(everything())


if __name__ == "__main__":
    main()
