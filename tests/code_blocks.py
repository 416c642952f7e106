"""The pages of the project, and the code blocks in them.

A comment above a block, which no reader sees, says why it is not run (`<!-- not run: it needs two GPUs -->`), or which
other test than `test_docs` runs it (`<!-- run by tests/test_demo.py -->`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "benchmarks/*.md", "examples/*.md", "packages/*/README.md", "docs/**/*.md")
PAGES = sorted(path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern))

_COMMENT = re.compile(r"<!-- (?:not run: (.+)|run by (.+)) -->")


@dataclass(frozen=True)
class Block:
    """What stands between two fences, and where."""

    page: str
    line: int
    """Of the page, on which its first line stands."""
    language: str
    text: str
    not_run: str | None
    run_by: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Its lines without comments, if it is of a shell."""
        lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in self.text.splitlines())
        return [line for line in lines if line]


def blocks(page: str) -> Iterator[Block]:
    """The code blocks of a page in order, without what is Sphinx's (`{toctree}`)."""
    lines = iter(enumerate((ROOT / page).read_text("utf-8").splitlines(), start=1))
    not_run = run_by = None
    for number, line in lines:
        if line.startswith("```"):
            held = []
            for _, inside in lines:
                if inside == "```":
                    break
                held.append(inside)
            if not line.startswith("```{"):
                yield Block(page, number + 1, line.removeprefix("```"), "\n".join(held) + "\n", not_run, run_by)
        if line:
            said = _COMMENT.fullmatch(line)
            not_run, run_by = said.groups() if said else (None, None)


ALL = [block for page in PAGES for block in blocks(page)]
