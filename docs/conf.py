"""The site: `hatch run docs` builds it from the Markdown here, in the repository's other pages, and the docstrings."""

from __future__ import annotations

import sys
from pathlib import Path

import liger

sys.path.insert(0, str(Path(__file__).parent))

project = "Liger"
release = version = liger.__version__
html_title = "Liger"
html_theme = "furo"
html_show_sphinx = False
html_copy_source = False
highlight_language = "none"  # of a block that names no language: a command, a tree

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "included_links",
    "mathml",
    "public_names",
]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

default_role = "py:obj"  # a word in `backticks`: as code, with a link where it is a name on a page
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
