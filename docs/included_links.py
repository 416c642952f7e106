"""A page of the repository that is included here links to others of the repository; those lead to the site's pages."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx

PAGES = {
    "CONTRIBUTING.md": "adapter",
    "benchmarks/README.md": "benchmarks",
    "examples/README.md": "examples",
    "packages/liger-core/README.md": "losses",
}
"""From a page of the repository, as README links to it, to the page of the site that includes it."""


def setup(app: Sphinx) -> dict[str, Any]:
    """Turn the links when a page has been read, before MyST looks for what they lead to."""
    app.connect("doctree-read", _turn)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _turn(app: Sphinx, doctree: nodes.document) -> None:
    for link in doctree.findall(addnodes.pending_xref):
        if link["reftype"] == "myst" and link["reftarget"] in PAGES:
            link["refdomain"], link["reftarget"], link["reftargetid"] = "doc", PAGES[link["reftarget"]], None
