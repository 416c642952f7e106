"""How the project's docstrings are read: as Google's, in which an indented paragraph is a formula or code, as it is.

A module's begins with the file that it stands in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sphinx.application import Sphinx


def setup(app: Sphinx) -> dict[str, Any]:
    """Say so in reStructuredText, before napoleon takes the docstring's sections apart."""
    app.connect("autodoc-process-docstring", _rewrite, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _rewrite(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = as_restructured_text(lines)
    if what == "module":
        _, _, file = Path(obj.__file__).as_posix().rpartition("/src/")
        lines[:0] = [f"*{file}*", ""]


def as_restructured_text(lines: list[str]) -> list[str]:
    """`lines` with `::` before each indented paragraph that stands below one at the margin.

    What a section such as "Args:" holds follows its heading directly, and stays as it is. In "Returns:" an empty type
    comes first: napoleon takes what is before a colon for one, and the signature has it already.
    """
    written: list[str] = []
    at_margin = False  # whether the last line that is not empty begins there
    for above, line in zip(["", *lines], lines, strict=False):
        if line.startswith(" ") and at_margin and not above.strip():
            written += ["::", ""]
        written.append(f"    : {line.strip()}" if above == "Returns:" else line)
        if line.strip():
            at_margin = not line.startswith(" ")
    return written
