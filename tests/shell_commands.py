"""Whether a command that a page shows is a real one: its script, module, package, file and options exist."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

from packaging.requirements import InvalidRequirement, Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
OTHERS = {("git", "push"), ("hatch", "build"), ("hatch", "publish")}
"""What needs the network or somebody's rights; shown, and believed."""


def environments():
    """The environments of hatch.toml, each with what it takes from its template."""
    stated = tomllib.loads((ROOT / "hatch.toml").read_text("utf-8"))["envs"]
    return {name: {**stated.get(table.get("template"), {}), **table} for name, table in stated.items()}


def complaint(command):
    """What is wrong with one line of a shell, or None."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    match words:
        case ["hatch", "-e", environment, "run", script, *rest]:
            return _of_hatch(environment, script, rest)
        case ["hatch", "run", script, *rest]:
            environment, _, name = script.rpartition(":")
            return _of_hatch(environment or "default", name, rest)
        case ["python", "-m", "pip", "install", *what]:
            return next(filter(None, map(_of_pip, what)), None)
        case ["python", "-m", module, *rest]:
            return _of_module(module, rest)
        case ["python", script, *rest] | ["torchrun", "--nproc-per-node", _, script, *rest]:
            return _of_script(script, rest)
        case ["bash", file]:
            return None if (ROOT / file).is_file() else f"no file {file}"
        case ["cd", folder]:
            return None if (ROOT / folder).is_dir() else f"no folder {folder}"
        case [program, verb, *_] if (program, verb) in OTHERS:
            return None
    return "is of no kind that this test knows"


def _of_hatch(environment, name, rest):
    made = environments()
    if environment not in made:
        return f"hatch.toml has no environment {environment}"
    script = {**made["default"]["scripts"], **made[environment].get("scripts", {})}.get(name)
    if script is None:
        return f"hatch.toml has no script {name}"
    if not rest or isinstance(script, list) or not script.startswith("python "):
        return None
    return complaint(script.replace("{args}", shlex.join(rest)))


def _of_pip(what):
    if what in PACKAGES or what == "hatch":
        return None
    if what.startswith("./"):
        return None if (ROOT / what / "pyproject.toml").is_file() else f"no package in {what}"
    try:
        name = Requirement(what.partition("[")[0]).name
    except InvalidRequirement:
        return f"pip does not take {what}"
    return None if name in PACKAGES else f"{what} is no package of ours"


def _of_script(script, words):
    """Its options are looked for in its text: it may import what is not installed here."""
    if not (ROOT / script).is_file():
        return f"no file {script}"
    return _unknown(words, (ROOT / script).read_text("utf-8"))


def _of_module(module, words):
    """It is asked for help, with these words."""
    with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):
        try:
            exists = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            exists = None
        if not exists:
            return f"no module {module}"
        status, shown = _help(module, tuple(words))
    return f"with --help exits with {status}: {shown}" if status else _unknown(words, shown)


def _unknown(words, known):
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    unknown = [option for option in options if not re.search(rf"{option}\b", known)]
    return f"does not know {', '.join(unknown)}" if unknown else None


@functools.cache
def _help(module, words):
    """(exit status, what it printed) of a module that is run with `words` and --help."""
    shown = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, *words, "--help"]),
        contextlib.redirect_stdout(shown),
        contextlib.redirect_stderr(shown),
    ):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as exit:
            return exit.code or 0, shown.getvalue()
    return "nothing: it has no --help", shown.getvalue()
