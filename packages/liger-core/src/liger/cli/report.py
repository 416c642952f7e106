"""`python -m liger`: what is installed, on what hardware, and what of it does not fit together.

The document: `python`, `platform`, `versions` (distribution → version or null), `environment` (variable → value),
`cuda`, `hip`, `driver` (version or null), `gpus` (`name`, `memory_gib`, `capability`), `ops` (`run`: "kernels" or
"references"; `because`; `trial`: "passed", null where no kernel runs, or the error), `adapters` (`model`,
`distribution`, `version`, `requires`, `classes`, `problem`: null or why it cannot be used) and `problems`, all of them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch
from packaging.requirements import Requirement

import liger
from liger.adapter import Adapter
from liger.cli.answer import Answer, Table
from liger.cli.hardware import driver_version, gpus, ops_run
from liger.discover import InstalledAdapter, unmet
from liger.ops import rms_norm
from liger.ops.rms_norm import reference

_REQUIRED = ("liger-core", "torch", "triton", "transformers")
_BESIDE = ("accelerate", "bitsandbytes", "deepspeed", "flash-attn", "liger-kernel", "peft", "torchao", "trl", "unsloth")
"""What else changes how a model trains, and is listed where it is installed."""

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "LIGER_DISABLE", "TRITON_CACHE_DIR", "TRITON_INTERPRET")


def report() -> Answer:
    """The report. Its exit status is 1 where a version is out of range, an adapter cannot be used or a kernel fails."""
    what, because = ops_run()
    trial = _trial() if what == "kernels" else None
    problems = _core_out_of_range()
    problems += [] if trial in (None, "passed") else [f"a kernel fails: {trial}"]
    try:
        installed = liger.adapters()
    except liger.AdapterConflictError as error:
        installed = {}
        problems.append(str(error))
    adapters = [_described(adapter) for _, adapter in sorted(installed.items())]
    problems += [f"{a['distribution']} {a['version']}, {a['model']}: {a['problem']}" for a in adapters if a["problem"]]
    data: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "driver": driver_version(),
        "gpus": gpus(),
        "ops": {"run": what, "because": because, "trial": trial},
        "adapters": adapters,
        "problems": problems,
    }
    return Answer("report", data, _page(data), status=1 if problems else 0)


def _core_out_of_range() -> list[str]:
    """What of liger-core's own requirements is not met: as a source tree on Python's path it has none."""
    try:
        requirements = importlib.metadata.requires("liger-core") or ()
    except importlib.metadata.PackageNotFoundError:
        return []
    return [f"liger-core {_version('liger-core')} {said}" for said in unmet(requirements)]


def versions() -> dict[str, str | None]:
    """The versions of what Liger runs with, None for what is not installed, and of what may run beside it."""
    found = {name: _version(name) for name in (*_REQUIRED, *_BESIDE)}
    return {name: version for name, version in found.items() if version or name in _REQUIRED}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _trial() -> str:
    """Compile and run a small kernel and its backward: "passed", or what went wrong, whatever it was."""
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.randn(4, 64, device=device, requires_grad=True)
        y, expected = rms_norm(x), reference(x)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(*(torch.autograd.grad(out, x, torch.ones_like(out))[0] for out in (y, expected)))
    except Exception as error:
        return _in_words(error)
    return "passed"


def _described(installed: InstalledAdapter) -> dict[str, Any]:
    adapter, problem = _load(installed)
    requirements = map(Requirement, installed.requires)
    applying = (r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""}))
    return {
        "model": installed.key,
        "distribution": installed.distribution,
        "version": installed.version,
        "requires": sorted(str(requirement) for requirement in applying),
        "classes": [head.model for head in adapter.heads] if adapter else [],
        "problem": problem,
    }


def _load(installed: InstalledAdapter) -> tuple[Adapter | None, str | None]:
    """The adapter, and why it cannot be used: a package that somebody else wrote may fail in any way."""
    try:
        adapter = installed.load()
        adapter.module()
    except Exception as error:
        return None, _in_words(error)
    return adapter, None


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _page(data: dict[str, Any]) -> list[str | Table]:
    ops = data["ops"]
    trial = {None: "", "passed": "; one was tried and is right"}.get(ops["trial"], "; one was tried and FAILS")
    facts = [("python", f"{data['python']}, {data['platform']}")]
    facts += [(name, version or "not installed") for name, version in data["versions"].items()]
    facts += list(data["environment"].items())
    facts += [(name, data[name]) for name in ("cuda", "hip", "driver") if data[name]]
    facts += [("GPU", f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['capability']}") for gpu in data["gpus"]]
    facts += [("ops run", f"{ops['run']}, {ops['because']}{trial}")]
    page: list[str | Table] = [Table(("what", "is"), facts), _adapters(data["adapters"])]
    if data["problems"]:
        page.append("\n".join(["Problems:", *(f"- {problem}" for problem in data["problems"])]))
    return page


def _adapters(adapters: list[dict[str, Any]]) -> str | Table:
    """A row for each distribution and state of its adapters."""
    models: dict[tuple[str, ...], list[str]] = {}
    for a in adapters:
        state = "cannot be used" if a["problem"] else "works"
        row = (a["distribution"], a["version"], ", ".join(a["requires"]), state)
        models.setdefault(row, []).append(a["model"])
    if not models:
        return "No adapter can be found: liger.apply knows no model. Try: pip install liger-llama"
    return Table(
        ("adapters of", "version", "which requires", "state", "models"),
        [(*row, ", ".join(names)) for row, names in sorted(models.items())],
    )
