"""Every name that an `__all__` makes public must stand on an API page: if not, that is a warning, and so an error."""

from __future__ import annotations

import importlib
from typing import Any

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

MODULES = ("liger", "liger.layers", "liger.losses", "liger.nn", "liger.ops", "liger.testing")


def setup(app: Sphinx) -> dict[str, Any]:
    """Look when all pages have been read."""
    app.connect("env-check-consistency", _look)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _look(app: Sphinx, env: BuildEnvironment) -> None:
    documented = set(env.domaindata["py"]["objects"])
    for module in MODULES:
        public = {f"{module}.{name}" for name in importlib.import_module(module).__all__ if name != "__version__"}
        for name in sorted(public - documented):
            logging.getLogger(__name__).warning("%s is public and on no API page", name)
