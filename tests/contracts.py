"""The contract classes that the packages' own tests define, for the tests that look at all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from liger.testing import AdapterContract

ROOT = Path(__file__).parent.parent


def contracts() -> dict[str, type[AdapterContract]]:
    """By name, `liger-llama TestLlama`, the contract of every adapter that a family's package tests."""
    found: dict[str, type[AdapterContract]] = {}
    for path in sorted(ROOT.glob("packages/*/tests/test_*.py")):
        package = path.parent.parent.name
        if package == "liger-core":  # its contracts are of adapters that exist in its tests only
            continue
        for value in vars(_imported(path, f"{package}.{path.stem}")).values():
            if isinstance(value, type) and issubclass(value, AdapterContract) and hasattr(value, "adapter"):
                found[f"{package} {value.__name__}"] = value
    return found


def _imported(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
