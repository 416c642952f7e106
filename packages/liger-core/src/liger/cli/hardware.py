"""What the ops run on here, and why not on something faster."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any, NamedTuple

import torch

from liger.ops import launch

_PATIENCE = 20
"""Seconds for nvidia-smi: with a broken driver it never returns."""


class OpsRun(NamedTuple):
    """What the ops run, "kernels" or "references", and where or why."""

    what: str
    because: str


def ops_run() -> OpsRun:
    """What `liger.ops.launch.runs_kernels` decides for the tensors of this machine's best device."""
    if launch.triton is None:
        return OpsRun("references", "Triton is not installed")
    if not launch.enabled:
        return OpsRun("references", "LIGER_DISABLE is set")
    if launch.INTERPRETED:
        return OpsRun("kernels", "in Triton's interpreter, slowly, because TRITON_INTERPRET=1")
    reason = why_no_gpu()
    if reason is not None:
        return OpsRun("references", reason)
    return OpsRun("kernels", "on GPU tensors in fp32, bf16 and fp16; references on all others")


def why_no_gpu() -> str | None:
    """Why PyTorch has no GPU here, in its own words, or None where it has one."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # an AssertionError is what a PyTorch without CUDA raises
        return f"no GPU: {str(error).splitlines()[0]}"
    return None


def gpus() -> list[dict[str, Any]]:
    """Each GPU that PyTorch sees: name, memory in GiB, compute capability."""
    if why_no_gpu() is not None:
        return []
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1), "capability": f"{gpu.major}.{gpu.minor}"}
        for gpu in found
    ]


def driver_version() -> str | None:
    """The NVIDIA driver's, None where there is none to ask, or that it hangs."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    query = [nvidia_smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return asked.stdout.split("\n")[0].strip() or None if asked.returncode == 0 else None
