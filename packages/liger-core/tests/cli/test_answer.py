"""How an answer is shown: Markdown for pasting, rich on a terminal, plain where rich is not installed."""

from __future__ import annotations

import io
import sys

import pytest

from liger.cli.answer import Answer, Table, show

TABLE = Table(("op", "ms", "why"), [("rms_norm", "1.5", "a [b] c"), ("swiglu", "10.25", "x | y")], frozenset({"ms"}))
MARKDOWN = """\
| op       |    ms | why |
| -------- | ----: | --- |
| rms_norm |   1.5 | a [b] c |
| swiglu   | 10.25 | x \\| y |"""


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def shown_on_a_terminal(monkeypatch):
    """Shows a page on a terminal of 60 columns, and returns what is seen there."""

    def shown(*page):
        monkeypatch.setenv("COLUMNS", "60")
        monkeypatch.setattr(sys, "stdout", Terminal())
        show(Answer("report", {}, list(page)))
        return sys.stdout.getvalue()

    return shown


def test_a_table_is_markdown_whose_cells_cannot_break_it():
    assert TABLE.markdown() == MARKDOWN


def test_what_is_piped_is_markdown_between_paragraphs(capsys):
    show(Answer("report", {}, ["before", TABLE, "after"]))
    assert capsys.readouterr().out == f"before\n\n{MARKDOWN}\n\nafter\n"


def test_a_terminal_gets_a_drawn_table_with_every_cell_as_it_is(shown_on_a_terminal):
    pytest.importorskip("rich")
    shown = shown_on_a_terminal("before", TABLE)
    assert "| op" not in shown
    assert "────" in shown
    for text in ("before", "a [b] c", "x | y", "10.25"):
        assert text in shown


def test_a_terminal_without_rich_gets_markdown(shown_on_a_terminal, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert shown_on_a_terminal(TABLE) == f"{MARKDOWN}\n"
