"""README's tables of the sweep, of convergence and of the soak."""

from __future__ import annotations

from typing import Any

from benchmarks.convergence import within
from benchmarks.markdown import head, row
from benchmarks.training import WAYS

Record = dict[str, Any]
COMPARED = (("liger", "eager"), ("liger", "liger-kernel"), ("liger, recompute", "eager"))
"""Which of ours has a column of its own beside which other."""


def _cell(record: Record | None) -> str:
    if record is None or "not_installed" in record:
        return "–"
    if "out_of_memory" in record:
        return "OOM"
    if "failed" in record:
        return "fails"
    return f"{record['tokens_per_second']:,.0f} / {record['peak_gib']:.1f}"


def _ratio(ours: Record | None, theirs: Record | None) -> str:
    if not ours or not theirs or "peak_gib" not in ours or "peak_gib" not in theirs:
        return "–"
    speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
    return f"{speed:.2f}× / {ours['peak_gib'] / theirs['peak_gib']:.2f}×"


def _sizes(groups: list[Record]) -> list[str]:
    rows = [entry for group in groups for entry in group["rows"]]
    ways = [way for way in WAYS if any(way in entry["ways"] for entry in rows)]
    pairs = [pair for pair in COMPARED if set(pair) <= set(ways)]
    lines = head(["model", "batch × sequence", *ways, *map(" : ".join, pairs)], words=2)
    for group in groups:
        for place, entry in enumerate(group["rows"]):
            found = entry["ways"]
            cells = [_cell(found.get(way)) for way in ways]
            cells += [_ratio(found.get(ours), found.get(other)) for ours, other in pairs]
            lines.append(row([group["title"] if place == 0 else "", f"{entry['batch']}×{entry['sequence']}", *cells]))
    return lines


def _tokens(record: Record | None) -> str:
    if record is None or "not_installed" in record:
        return "–"
    if "tokens" not in record:
        return "fails"
    return "none" if record["tokens"] is None else f"{'≥ ' if record['or_more'] else ''}{record['tokens']:,}"


def _longest(groups: list[Record]) -> list[str]:
    ways = [way for way in WAYS if any(way in group["longest"] for group in groups)]
    lines = head(["longest sequence", *ways], words=1)
    return lines + [row([group["title"], *(_tokens(group["longest"].get(way)) for way in ways)]) for group in groups]


def sweep(results: Record) -> list[str]:
    """The paragraphs of a sweep."""
    groups = [group for group in results["sweep"] if group["rows"]]
    searched = [group for group in results["sweep"] if group["longest"]]
    parts = []
    if groups:
        parts += [
            "Training steps with fused AdamW in bf16 at growing sizes (OOM: out of memory; –: not measured): tokens "
            "per second / peak GiB, and ours as a multiple of others':",
            "\n".join(_sizes(groups)),
        ]
    if searched:
        parts += [
            "The longest sequence that fits with batch 1, among powers of two and ¾ of them (≥: the longest tried):",
            "\n".join(_longest(searched)),
        ]
    return parts


def convergence(results: Record) -> list[str]:
    """The paragraphs of the convergence runs."""
    columns = ["family", "steps", "stock", "patched", "other seeds", "patched − stock", "spread of seeds", "within"]
    lines = head(columns, words=1)
    for family, entry in results["convergence"].items():
        if "final" not in entry:
            lines.append(row([f"{family} (not finished)", *["–"] * 7]))
            continue
        steps = len(entry["runs"]["stock"]["losses"])
        differences = [f"{entry[f'final_{of}']:.4f} / {entry[f'curve_{of}']:.4f}" for of in ("difference", "spread")]
        finals = {run: f"{loss:.4f}" for run, loss in entry["final"].items()}
        known = [finals.pop("stock"), finals.pop("patched")]
        others = ", ".join(finals.values())
        lines.append(row([family, str(steps), *known, others, *differences, "yes" if within(entry) else "no"]))
    return [
        "Models of 100 million parameters on real text: the mean loss of the last 20 steps, and how far the patched "
        "run is from stock, and stock runs from each other: at the end / over the whole curve (root mean square).",
        "\n".join(lines),
    ]


def soak(results: Record) -> list[str]:
    """The paragraph of a soak."""
    marks, wrong = results["soak"]["marks"], results["soak"]["complaints"]
    last = marks[-1]
    variants = f"{marks[0]['variants']} variants compiled by step {marks[0]['step']}, {last['variants']} at the end"
    memory = "; ".join(
        f"{name} {', '.join(f'{mark[key]:,.0f}' for mark in (marks[0], marks[len(marks) // 2], last))} MiB"
        for key, name in (("allocated_mib", "allocated"), ("reserved_mib", "reserved"), ("resident_mib", "host"))
        if last[key] is not None
    )
    return [
        f"{last['step']:,} steps of a small patched Llama over random shapes in one process, with evaluation and "
        f"generation: {variants}; memory at the first look, half-way and at the end: {memory}. "
        f"{'Wrong: ' + '; '.join(wrong) if wrong else 'Every loss, gradient norm and logit was finite'}."
    ]
