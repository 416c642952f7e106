"""The files in benchmarks/results: what machine and versions they are of, and how they are written."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_ROW_OF_NUMBERS = re.compile(r"\[\s+(-?[\d.][^\[\]{}\"]*?)\s+\]")


def device_name(device: torch.device) -> str:
    """The GPU's name, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def versions() -> dict[str, str]:
    """Of Python and of each package that is measured or that measures, where it is installed."""
    found = {"python": platform.python_version()}
    packages = (
        "liger-kernel", "nvidia-cutlass-dsl", "cut-cross-entropy", "flash-linear-attention", "quack-kernels", "trl",
    )  # fmt: skip
    for name in ("torch", "triton", "transformers", "liger-core", *packages):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def earlier(file: Path, device: str) -> dict[str, Any]:
    """What an earlier run wrote there; nothing where there is no file. Raises SystemExit for another device's."""
    if not file.exists():
        return {}
    found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if found["device"] != device:
        raise SystemExit(f"--add: {file} is of {found['device']}, this is {device}")
    return found


def write(file: Path, results: dict[str, Any]) -> None:
    """Replace the file in one go, so that whoever is killed leaves a whole one. A list of numbers takes one line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    text = _ROW_OF_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)
    new = file.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    os.replace(new, file)
