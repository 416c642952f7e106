"""The support tables of README and of each family's README, from the adapters: `hatch run table --write`.

Without `--write` the whole table is printed. A row is what `liger.apply` says of the tiny models that the packages' own
contract tests build, here without weights. tests/test_support_table.py fails when a page has another table.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch

from liger.adapter import Kind

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin: hatch run table -->", "<!-- end -->"
COLUMNS: tuple[Kind, ...] = ("norm", "mlp", "experts", "rope", "loss")
RUNS, ABSENT = "✓", "–"

if set(COLUMNS) != set(get_args(Kind)):
    raise TypeError(f"the table has columns {COLUMNS}, liger.apply has {get_args(Kind)}")


@dataclass
class Support:
    """What runs on kernels of one model, and the reasons for what does not."""

    package: str
    key: str
    model: str
    runs: set[str] = field(default_factory=set)
    declined: dict[str, set[str]] = field(default_factory=dict)


def supports() -> list[Support]:
    """Of each model that the packages test, sorted by package and model."""
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        contracts: dict[str, Any] = importlib.import_module("contracts").contracts()
    finally:
        sys.path.pop(0)
    found: dict[tuple[str, str, str], Support] = {}
    for name, contract in contracts.items():
        test = contract()
        names = (name.split()[0], test.adapter.key, test.language_model)
        support = found.setdefault(names, Support(*names))
        with torch.device("meta"):
            model = getattr(test.adapter.module(), test.language_model)(test.config())
        patch = test.apply(model)
        support.runs |= {swapped.kind for swapped in patch.swapped}
        for declined in patch.declined:
            support.declined.setdefault(declined.kind, set()).add(f"`{declined.cls}`: {declined.reason}")
    return [found[names] for names in sorted(found)]


def _cells(support: Support, notes: list[str]) -> Iterator[str]:
    """A model's cells; each new reason is added to `notes`, and the cell gives its number there."""
    for kind in COLUMNS:
        numbers = []
        for reason in sorted(support.declined.get(kind, ())):
            if reason not in notes:
                notes.append(reason)
            numbers.append(f"({notes.index(reason) + 1})")
        runs = [RUNS] if kind in support.runs else []
        yield " ".join([*runs, *numbers]) or ABSENT


def table(rows: list[Support], with_package: bool) -> str:
    """The table of these models, and below it the reasons of what keeps transformers' code."""
    head = [*(["package"] if with_package else []), "`transformers.models`", "class", *COLUMNS]
    words = len(head) - len(COLUMNS)
    lines = [_row(head), _row(["---"] * words + [":---:"] * len(COLUMNS))]
    notes: list[str] = []
    for row in rows:
        package = [f"`{row.package}`"] if with_package else []
        lines.append(_row([*package, f"`{row.key}`", f"`{row.model}`", *_cells(row, notes)]))
    legend = f"{RUNS}: runs on a kernel. {ABSENT}: the model's file in transformers has no such part."
    if not notes:
        return "\n".join([*lines, "", legend])
    numbered = [f"{number}. {note}." for number, note in enumerate(notes, 1)]
    return "\n".join(
        [*lines, "", f"{legend} A number: it keeps transformers' code, for the reason below.", "", *numbered]
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def pages() -> dict[Path, str]:
    """Each README that has a table, with the present one between its two markers."""
    rows = supports()
    tables = {ROOT / "README.md": table(rows, with_package=True)}
    for package in sorted({row.package for row in rows}):
        own = [row for row in rows if row.package == package]
        tables[ROOT / "packages" / package / "README.md"] = table(own, with_package=False)
    return {path: _updated(path, text) for path, text in tables.items()}


def _updated(path: Path, text: str) -> str:
    before, _, rest = path.read_text("utf-8").partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"{path.relative_to(ROOT)} needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main() -> None:
    """Print the table, or write all of them."""
    parser = argparse.ArgumentParser(prog="hatch run table", description="The support tables of the READMEs.")
    parser.add_argument("--write", action="store_true", help="put them into the READMEs")
    if parser.parse_args().write:
        for path, text in pages().items():
            path.write_text(text, encoding="utf-8")
    else:
        print(table(supports(), with_package=True))


if __name__ == "__main__":
    main()
