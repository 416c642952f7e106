"""Pictures of result files: `python -m benchmarks.plot benchmarks/results/h100.json` writes them beside the file.

Of the ops a picture each; of a sweep, a picture of each model; of the convergence runs, one of all families.

An op's picture: a group of bars for each shape, a bar for each peer, with the floor as a line across the group. Shapes
and peers that lose are shown like the others; a peer that fails at a shape has the word in the place of its bar. A bar
that would dwarf the others is cut off at the top and says so with an arrow.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.peers import NAMES

_COLORS = ("#9e9e9e", "#5f6b7a", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b59f00", "#0047ab")
COLORS = {**dict(zip(NAMES, _COLORS, strict=True)), "liger, recompute": "#8fb3f0"}
Case = dict[str, Any]
Record = dict[str, Any]


def _bars(axes: Any, cases: list[Case], names: list[str], key: str, digits: int) -> None:
    width = 0.84 / len(names)
    shown = [record[key] for case in cases for record in case["peers"].values() if "failed" not in record]
    top = min(max(shown, default=1.0), 2.5 * statistics.median(shown or [1.0]))
    for place, name in enumerate(names):
        middles = [group - 0.42 + (place + 0.5) * width for group in range(len(cases))]
        records = [case["peers"].get(name) for case in cases]
        heights = [record[key] if record and "failed" not in record else 0.0 for record in records]
        axes.bar(middles, [min(height, top) for height in heights], width * 0.92, color=COLORS[name], label=name)
        for middle, height, record in zip(middles, heights, records, strict=True):
            if record is not None:
                arrow = " →" if height > top else ""
                text = "fails" if "failed" in record else f"{height:,.{digits}f}{arrow}"
                axes.annotate(
                    text, (middle, min(height, top)), xytext=(0, 3), textcoords="offset points", rotation=90,
                    fontsize=7, ha="center", va="bottom", zorder=4,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                )  # fmt: skip
    axes.set_xticks(range(len(cases)), [case["shape"] for case in cases])
    axes.set_xlim(-0.5, len(cases) - 0.5)
    axes.set_ylim(0, 1.25 * top)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _floors(axes: Any, cases: list[Case]) -> None:
    floors = [case["floor_ms"] for case in cases]
    groups = range(len(cases))
    axes.hlines(
        floors, [group - 0.46 for group in groups], [group + 0.46 for group in groups], colors="black",
        linestyles="dashed", linewidth=1, label="floor", zorder=3,
    )  # fmt: skip


def picture(op: str, cases: list[Case], device: str, file: Path) -> None:
    """Write one op's picture."""
    names = [name for name in NAMES if any(name in case["peers"] for case in cases)]
    with_memory = op.startswith("linear_")
    size = (max(7.0, 1.5 + 0.24 * len(names) * len(cases) + 0.6 * len(cases)), 8.0 if with_memory else 4.5)
    figure, all_axes = plt.subplots(2 if with_memory else 1, 1, figsize=size, squeeze=False, layout="constrained")
    times = all_axes[0][0]
    largest = max((r["gpu_ms"] for case in cases for r in case["peers"].values() if "failed" not in r), default=1.0)
    _bars(times, cases, names, "gpu_ms", digits=1 if largest >= 30 else 2 if largest >= 10 else 3)
    _floors(times, cases)
    times.set_ylabel("GPU ms, forward + backward")
    times.set_title(f"{op} on {device}")
    times.legend(fontsize=8, ncols=len(names) + 1, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)
    if with_memory:
        _bars(all_axes[1][0], cases, names, "peak_mib", digits=0)
        all_axes[1][0].set_ylabel("peak MiB")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _against_size(axes: Any, rows: list[Record], key: str) -> None:
    tokens = [row["batch"] * row["sequence"] for row in rows]
    for way in dict.fromkeys(way for row in rows for way in row["ways"]):
        measured = [(at, row["ways"].get(way, {})) for at, row in zip(tokens, rows, strict=True)]
        points = [(at, record[key]) for at, record in measured if key in record]
        axes.plot(*zip(*points, strict=True), marker="o", color=COLORS[way], label=way) if points else None
        too_large = next((at for at, record in measured if "out_of_memory" in record), None)
        if too_large and points:
            axes.plot([points[-1][0], too_large], [points[-1][1]] * 2, color=COLORS[way], linestyle=":")
            axes.plot([too_large], [points[-1][1]], marker="x", color=COLORS[way], markersize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{row['batch']}×{row['sequence']}" for row in rows])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def sweep_picture(group: Record, device: str, file: Path) -> None:
    """Write the picture of one model: tokens per second and memory against the size, a cross where memory ran out."""
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = [row for row in group["rows"] if row["sequence"] == group["rows"][0]["sequence"]]
    _against_size(speed, rows, "tokens_per_second")
    _against_size(memory, rows, "peak_gib")
    speed.set_ylabel("tokens / s")
    memory.set_ylabel("peak GiB")
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{group['title']} on {device}; × out of memory", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def convergence_picture(families: dict[str, Record], device: str, file: Path) -> None:
    """Write the curves of each family, and under them how far the other runs are from the stock one."""
    figure, all_axes = plt.subplots(
        2, len(families), figsize=(3.6 * len(families), 6), squeeze=False, sharex="col", layout="constrained"
    )
    for (family, entry), (losses, distance) in zip(families.items(), all_axes.T, strict=True):
        stock = entry["runs"]["stock"]["losses"]
        for (name, run), color in zip(
            entry["runs"].items(), ("#9e9e9e", "#0047ab", "#e69f00", "#d55e00", "#b59f00"), strict=False
        ):
            losses.plot(
                run["losses"], color=color, label=name, linewidth=1, linestyle="--" if name == "patched" else "-"
            )
            if name != "stock":
                apart = [abs(a - b) for a, b in zip(run["losses"], stock, strict=False)]
                distance.plot(apart, color=color, label=f"|{name} − stock|", linewidth=1)
        losses.set_title(family)
        distance.set_yscale("log")
        distance.set_xlabel("step")
        for axes in (losses, distance):
            axes.legend(frameon=False, fontsize=8)
            axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("loss")
    figure.suptitle(f"100M parameters on real text, on {device}", fontsize=10)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def pictures(file: Path) -> list[Path]:
    """Write the pictures of a result file, `<its name>-<what it shows>.png`, beside it."""
    results = json.loads(file.read_text("utf-8"))
    written = []
    for op in dict.fromkeys(case["op"] for case in results.get("cases", [])):
        cases = [case for case in results["cases"] if case["op"] == op and case["floor_ms"] is not None]
        if cases:
            written.append(file.with_name(f"{file.stem}-{op}.png"))
            picture(op, cases, results["device"], written[-1])
    for group in results.get("sweep", []):
        if len(group["rows"]) > 1:
            written.append(file.with_name(f"{file.stem}-{group['name'].replace(', ', '-')}.png"))
            sweep_picture(group, results["device"], written[-1])
    families = {family: entry for family, entry in results.get("convergence", {}).items() if entry["runs"]}
    if families:
        written.append(file.with_suffix(".png"))
        convergence_picture(families, results["device"], written[-1])
    return written


def main() -> None:
    """Draw the files that are named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description="Pictures of result files.")
    parser.add_argument("results", type=Path, nargs="+", help="what --json wrote")
    for file in parser.parse_args().results:
        print(*pictures(file), sep="\n")


if __name__ == "__main__":
    main()
