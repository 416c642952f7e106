"""What core promises to adapters: the names of core 0.1 and their parameters, and an adapter written for them."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FROZEN = ROOT / "tests/data/adapter_of_core_0_1"
NAMES = json.loads((FROZEN / "names.json").read_text("utf-8"))
FAMILIES = sorted(path for path in ROOT.glob("packages/liger-*") if path.name != "liger-core")
SINCE_0_1 = "found_and_used or equals_its_original or loss_and_gradients or undo or generate or save_pretrained"


def said_in_contributing():
    """Each promised module and the names in it, None for its `__all__`."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## What an adapter may rely on")[2]
    for module, names in re.findall(r"^- `(liger[\w.]*)`: (.+)$", text.partition("\n## ")[0], re.M):
        yield module, set(re.findall(r"`(\w+)`", names)) if "`__all__`" not in names else None


PROMISED = dict(said_in_contributing())


@pytest.mark.parametrize(("name", "parameters"), NAMES.items(), ids=NAMES)
def test_a_name_of_core_0_1_is_there_and_takes_what_it_took(name, parameters):
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if parameters is None:
        return
    present = inspect.signature(value).parameters
    assert [name for name in present if name in parameters] == parameters
    added = [name for name in present if name not in parameters]
    assert all(present[name].default is not inspect.Parameter.empty for name in added), f"without a default: {added}"
    in_order = [name for name, parameter in present.items() if parameter.kind is not parameter.KEYWORD_ONLY]
    known = [name for name in in_order if name in parameters]
    assert in_order[: len(known)] == known, "who passes them by position meets another one"


def test_contributing_lists_what_is_frozen():
    assert PROMISED.keys() == {name.rpartition(".")[0] for name in NAMES}
    for module, names in PROMISED.items():
        frozen = {name.rpartition(".")[2] for name in NAMES if name.rpartition(".")[0] == module}
        assert frozen <= (set(importlib.import_module(module).__all__) if names is None else names), module


@pytest.mark.parametrize("package", FAMILIES, ids=lambda path: path.name)
def test_a_family_uses_nothing_else_of_core(package):
    for path in [*package.glob("src/**/*.py"), *package.glob("tests/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.ImportFrom) or (node.module or "").partition(".")[0] != "liger":
                continue
            assert node.module in PROMISED, f"{path.name} imports {node.module}"
            names = PROMISED[node.module] or set(importlib.import_module(node.module).__all__)
            assert {alias.name for alias in node.names} <= names, f"{path.name} imports from {node.module}"


def test_an_adapter_written_for_core_0_1_passes_its_contract():
    environment = {**os.environ, "PYTHONPATH": str(FROZEN / "src")}
    plugin = ["-p", "liger.testing.plugin", "-p", "no:cacheprovider", "--import-mode=importlib"]
    chosen = ["-k", f"({SINCE_0_1}) and not kernel", "contract.py"]
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(FROZEN), *plugin, *chosen]
    done = subprocess.run(command, cwd=FROZEN, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\b1[0-9] passed", done.stdout), done.stdout
