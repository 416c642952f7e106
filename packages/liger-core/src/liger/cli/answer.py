"""What a command answers, a JSON document for programs and a page for people, and how either is shown.

On a terminal where `rich` is installed (`pip install liger-core[cli]`), tables are drawn to its width. Elsewhere they
are Markdown, which reads as it is and can be pasted into an issue.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 1
"""The version of the documents. Keys may be added to them; one that goes or changes its meaning raises this number."""


class RefusalError(Exception):
    """A command cannot answer. `status` is the exit status: 1, no by what is installed; 2, it was asked wrongly."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Table:
    """Rows under column names. The columns in `numbers` are aligned at the right."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    numbers: frozenset[str] = frozenset()

    def markdown(self) -> str:
        """Padded so that it reads as text too. The last column is not: it holds the long reasons."""
        escaped = [[cell.replace("|", "\\|") for cell in row] for row in (self.columns, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
        widths[-1] = len(self.columns[-1]) if self.columns[-1] not in self.numbers else widths[-1]
        right = [name in self.numbers for name in self.columns]
        rule = ["-" * (width - 1) + (":" if end else "-") for width, end in zip(widths, right, strict=True)]
        padded = (
            [f"{cell:{'>' if end else '<'}{width}}" for cell, width, end in zip(row, widths, right, strict=True)]
            for row in (escaped[0], rule, *escaped[1:])
        )
        return "\n".join(f"| {' | '.join(row)} |" for row in padded)


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        command: its name.
        data: the document, of JSON's types.
        page: the same for people: paragraphs and tables.
        status: the exit status.
    """

    command: str
    data: dict[str, Any]
    page: list[str | Table]
    status: int = 0


def show(answer: Answer) -> None:
    """Write the page to stdout."""
    if not (sys.stdout.isatty() and _draw(answer.page)):
        blocks = (block if isinstance(block, str) else block.markdown() for block in answer.page)
        sys.stdout.write("\n\n".join(blocks) + "\n")


def show_json(command: str, data: dict[str, Any]) -> None:
    """Write the document, and nothing else, to stdout."""
    sys.stdout.write(json.dumps({"schema": SCHEMA, "command": command, **data}, indent=1) + "\n")


def _draw(page: list[str | Table]) -> bool:
    """Show the page by rich, if that is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text
    except ImportError:
        return False
    console = Console(highlight=False)
    for block in page:
        if isinstance(block, str):
            console.print(Text(block), end="\n\n")
            continue
        drawn = Drawn(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in block.columns:
            drawn.add_column(name, justify="right" if name in block.numbers else "left", overflow="fold")
        for row in block.rows:
            drawn.add_row(*map(Text, row))
        console.print(drawn)
    return True
