"""The demo's table and its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MIB = 2**20


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The two runs side by side."""
    stock, patched = runs["stock"], runs["patched"]
    apart = max(abs(a - b) for a, b in zip(stock["losses"], patched["losses"], strict=True))
    last = max(1, len(stock["losses"]) // 10)

    def end(run: dict[str, Any]) -> float:
        return float(sum(run["losses"][-last:]) / last)

    rows = [
        ("", "stock", "patched"),
        ("loss at the start", f"{stock['losses'][0]:.4f}", f"{patched['losses'][0]:.4f}"),
        (f"loss at the end (mean of {last})", f"{end(stock):.4f}", f"{end(patched):.4f}"),
        ("largest difference along the curve", "", f"{apart:.2e}"),
        ("peak memory, MiB", f"{stock['peak_bytes'] / MIB:,.0f}", f"{patched['peak_bytes'] / MIB:,.0f}"),
        ("  of it weights and optimizer, MiB", *(f"{run['baseline_bytes'] / MIB:,.0f}" for run in (stock, patched))),
        ("tokens per second", *(f"{run['tokens_per_second']:,.0f}" for run in (stock, patched))),
    ]
    return "\n".join(f"{label:<36}{left:>12}{right:>12}" for label, left, right in rows)


def draw(runs: dict[str, dict[str, Any]], path: Path) -> Path | None:
    """The two loss curves and the two memory profiles; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curve, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, run), style in zip(runs.items(), ("-", "--"), strict=True):
        curve.plot(run["losses"], style, label=name, linewidth=1.5)
        times, sizes = zip(*run["profile"], strict=True)
        # Each step is as wide as the other: under the profiler its length says nothing.
        memory.step([t / times[-1] for t in times], [size / MIB for size in sizes], style, where="post", label=name)
    curve.set(title="loss", xlabel="step", ylabel="cross-entropy")
    memory.set(title="memory of one step", xlabel="from the beginning of the step to its end", ylabel="MiB allocated")
    memory.set_ylim(bottom=0)
    for axes in (curve, memory):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return path
