"""README's tables, from the figures in benchmarks/results: `python -m benchmarks.table --write`.

Without `--write` they are printed. tests/test_benchmarks.py fails when README has other tables than this makes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.peers import NAMES

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- begin: python -m benchmarks.table -->", "<!-- end -->"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(cells: list[str], words: int) -> list[str]:
    return [_row(cells), _row(["---"] * words + ["---:"] * (len(cells) - words))]


def _time(record: dict[str, Any] | None, with_memory: bool) -> str:
    if record is None:
        return "–"
    if "failed" in record:
        return "fails"
    digits = 3 if record["gpu_ms"] < 10 else 1
    memory = f" / {record['peak_mib']:,.0f}" if with_memory else ""
    return f"{record['gpu_ms']:.{digits}f}{memory}"


def _host(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    return "fails" if "failed" in record else f"{record['host_us']:.0f}"


def _ops(results: dict[str, Any], names: list[str]) -> list[str]:
    lines = _head(["op", "shape", "floor", *names], words=2)
    for case in results["cases"]:
        with_memory = case["op"].endswith("cross_entropy")
        times = [_time(case["peers"].get(name), with_memory) for name in names]
        lines.append(_row([case["op"], case["shape"], f"{case['floor_ms']:.3g}", *times]))
    return lines


def _hosts(results: dict[str, Any], names: list[str]) -> list[str]:
    lines = _head(["op", *names], words=1)
    first = {case["op"]: case for case in reversed(results["cases"])}
    for op in dict.fromkeys(case["op"] for case in results["cases"]):
        lines.append(_row([op, *(_host(first[op]["peers"].get(name)) for name in names)]))
    return lines


def _steps(results: dict[str, Any]) -> list[str]:
    lines = _head(["", "tokens per second", "peak GiB"], words=1)
    for way, record in results["steps"].items():
        failed = "failed" in record
        tokens, peak = ("fails", "") if failed else (f"{record['tokens_per_second']:,.0f}", f"{record['peak_gib']:.1f}")
        lines.append(_row([way, tokens, peak]))
    return lines


def section(results: dict[str, Any]) -> str:
    """The tables of one machine."""
    names = [name for name in NAMES if any(name in case["peers"] for case in results["cases"])]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [f"### {results['device']}", f"{versions}."]
    if results["cases"]:
        parts += [
            "GPU milliseconds of forward + backward in bf16, for the losses with peak MiB:",
            "\n".join(_ops(results, names)),
            "Microseconds of host time for forward + backward at tiny sizes:",
            "\n".join(_hosts(results, names)),
        ]
    if results["steps"]:
        parts += [
            "Training a LLaMA of 1B parameters (16 layers, hidden size 2048, vocabulary 128,256) on 4 × 4096 tokens:",
            "\n".join(_steps(results)),
        ]
    return "\n\n".join(parts)


def tables() -> str:
    """The tables of every machine that has a result file."""
    files = sorted(RESULTS.glob("*.json"))
    if not files:
        return "No result file is in benchmarks/results yet."
    return "\n\n".join(section(json.loads(file.read_text("utf-8"))) for file in files)


def updated(readme: str) -> str:
    """`readme` with the present tables between its two markers."""
    before, _, rest = readme.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def main() -> None:
    """Print the tables, or write them into README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description="README's tables.")
    parser.add_argument("--write", action="store_true", help="put them into README.md")
    if parser.parse_args().write:
        README.write_text(updated(README.read_text("utf-8")), encoding="utf-8")
    else:
        print(tables())


if __name__ == "__main__":
    main()
