"""Tables in Markdown."""

from __future__ import annotations


def row(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def head(cells: list[str], words: int) -> list[str]:
    """The first two lines of a table, whose first `words` columns are words and the others numbers."""
    return [row(cells), row(["---"] * words + ["---:"] * (len(cells) - words))]
