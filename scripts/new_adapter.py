"""A package for a model that no family has: `hatch run new-adapter olmo2 --to ..` writes `../liger-olmo2`.

What runs which kernel is found by trying (`try_kernels`). What no kernel computes is named in the adapter with the
reason; the contract, which the package's test inherits, says what else is missing.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

import liger
import rotary_in_own_dtype
from liger.layers import Stock
from liger.testing import TINY
from try_kernels import Findings, RefusalError, expression, find

PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "liger-{name}"
description = "Liger's kernels for {model} of Hugging Face transformers."
readme = "README.md"
requires-python = ">=3.10"
dependencies = ["liger-core{core}", "transformers{transformers}"]
dynamic = ["version"]

[project.optional-dependencies]
testing = ["liger-core[testing]"]

[project.entry-points."liger.adapters"]
{key} = "liger_{key}:{key}"

[tool.hatch.version]
path = "src/liger_{key}/__init__.py"

[tool.hatch.build.targets.wheel]
packages = ["src/liger_{key}"]

[tool.hatch.build.targets.sdist]
include = ["/src", "/tests", "/CHANGELOG.md"]

[tool.pytest.ini_options]
addopts = "-p liger.testing.plugin --import-mode=importlib --strict-markers"
testpaths = ["tests"]
"""

SOURCE = '''\
"""The adapter of {model} for Liger: which class of transformers runs on which kernel."""

{imports}

__version__ = "0.1.0"

{key} = Adapter(modeling="{modeling}", modules={modules}, functions={functions}, head={head},)
'''

TEST = '''\
"""The contract for {model}."""

from __future__ import annotations

from liger_{key} import {key}
from transformers import {config}

from liger.testing import TINY, AdapterContract


class Test{stem}(AdapterContract):
    adapter = {key}
    model_class = "{model}"
{declines}
    def config(self):
        return {config}({tiny}, {options})
'''

README = """\
# liger-{name}

Liger's kernels for `{model}` of Hugging Face transformers. Once it is installed, `liger.apply(model)` finds it.

What keeps transformers' code, and why:

{left}

The contract that it must pass: `python -m pip install -e ".[testing]"`, then `python -m pytest`.
"""

CHANGELOG = """\
# Changelog of liger-{name}

<!-- releases -->

## 0.1.0, unreleased

- The adapter for `transformers.models.{key}`.
"""

NOTHING = "nothing that has the look of a norm, a gated MLP, experts or a rotary function"


def texts(found: Findings) -> dict[str, str]:
    """The package's files, by path."""
    key, adapter = found.adapter.key, found.adapter
    layers = {name: expression(layer) for name, layer in adapter.modules.items()}
    resized = ", ".join(f"{name!r}: {value!r}" for name, value in found.options.items() if name in TINY)
    ops = {name: repr(op) if isinstance(op, str) else op.__name__ for name, op in adapter.functions.items()}
    names = {
        "key": key,
        "name": key.replace("_", "-"),
        "model": found.model,
        "stem": found.model.removesuffix("ForCausalLM"),
        "modeling": adapter.modeling,
        "config": found.config,
        "core": range_of("liger-core"),
        "transformers": range_of("transformers"),
        "modules": _mapping(layers),
        "functions": _mapping(ops),
        "head": expression(adapter.head) if adapter.head else None,
        "declines": f"    declines = {found.declines}\n" if found.declines else "",
        "tiny": f"**{{**TINY, {resized}}}" if resized else "**TINY",
        "options": ", ".join(f"{name}={value!r}" for name, value in found.options.items() if name not in TINY),
        "left": "\n".join(f"- {line}" for line in left_out(found)) or f"- {NOTHING}",
    }
    folder = f"src/liger_{key}"
    copied = {f"{folder}/rotary_in_own_dtype.py": Path(rotary_in_own_dtype.__file__).read_text("utf-8")}
    return {
        "pyproject.toml": PYPROJECT.format(**names),
        "README.md": README.format(**names),
        "CHANGELOG.md": CHANGELOG.format(**names),
        f"{folder}/__init__.py": SOURCE.format(
            **names, imports="\n".join(_imports(key, [*layers.values(), *ops.values(), names["head"] or ""]))
        ),
        f"{folder}/py.typed": "",
        f"tests/test_{key}.py": TEST.format(**names),
        **(copied if "rotary_in_own_dtype" in ops.values() else {}),
    }


def range_of(distribution: str) -> str:
    """From the installed minor version to the next major one."""
    installed = Version(version(distribution))
    return f">={installed.major}.{installed.minor},<{installed.major + 1}"


def left_out(found: Findings) -> Iterator[str]:
    """What the kernels leave to transformers, in words."""
    for name, layer in found.adapter.modules.items():
        if isinstance(layer, Stock):
            yield f"`{name}` {layer.reason}."
    for name, op in found.adapter.functions.items():
        if isinstance(op, str):
            yield f"`{name}` {op}."
    if found.adapter.head is None:
        yield f"The loss of `{found.model}`: it is not its head's output, scaled or capped by one number of the model."


def _mapping(values: dict[str, str]) -> str:
    return f"{{{''.join(f'{name!r}: {value},' for name, value in values.items())}}}"


def _imports(key: str, expressions: list[str]) -> Iterator[str]:
    """The imports that the expressions of an adapter need."""
    used = {node.id for text in expressions if text for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    yield "from liger.adapter import Adapter"
    places = {
        "liger.causal_lm": {"CausalLM"},
        "liger.layers": {"Experts", "FusedGatedMLP", "GatedMLP", "LayerNorm", "RMSNorm", "Stock"},
        "liger.ops": {"rotary", "rotary_one"},
        f"liger_{key}.rotary_in_own_dtype": {"rotary_in_own_dtype"},
    }
    for place, names in places.items():
        if names & used:
            yield f"from {place} import {', '.join(sorted(names & used))}"


def write(found: Findings, folder: Path) -> None:
    """Write the package, formatted by ruff."""
    for name, text in texts(found).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    # As the package's own settings will have it, and not those of the project that it is written from.
    for command in (["check", "--quiet", "--select", "I", "--fix"], ["format", "--quiet", "--line-length", "120"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, "--isolated", "--no-cache"], cwd=folder, check=True)


def main() -> None:
    """Write the package of one model, and say what it does."""
    parser = argparse.ArgumentParser(prog="new_adapter.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="its package in transformers.models: olmo2")
    parser.add_argument("--to", type=Path, default=Path(), help="the folder that the package's folder is made in")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="what a tiny config needs besides")
    given = parser.parse_args()
    folder = given.to / f"liger-{given.model.replace('_', '-')}"
    if folder.exists():
        parser.error(f"{folder} exists")
    if given.model in liger.adapters():
        parser.error(f"{liger.adapters()[given.model].distribution}, which is installed, has an adapter for it")
    options: dict[str, Any] = {
        name: ast.literal_eval(value) for name, _, value in (s.partition("=") for s in given.set)
    }
    try:
        modeling = importlib.import_module(f"transformers.models.{given.model}.modeling_{given.model}")
    except ModuleNotFoundError:
        parser.error(
            f"transformers {version('transformers')} has no transformers.models.{given.model}.modeling_{given.model}"
        )
    try:
        found = find(modeling, options)
    except RefusalError as error:
        parser.error(str(error))
    write(found, folder)
    head = expression(found.adapter.head) if found.adapter.head else "no head"
    print(f"{folder}: {', '.join([*found.adapter.modules, *found.adapter.functions])}, and {head}")
    print("\n".join(["Left to transformers:", *(list(left_out(found)) or [NOTHING])]))
    python = sys.executable  # that has liger-core, which need not be on an index
    print(f"Next: cd {folder} && {python} -m pip install -e '.[testing]' && {python} -m pytest")


if __name__ == "__main__":
    main()
