"""Every kernel, compiled for GPUs that this machine need not have: what it asks for, they have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("backend", "architecture", "shared"),
    [("cuda", "89", 99), ("cuda", "90", 227), ("hip", "gfx942", 64)],
    ids=["L4 and RTX", "H100", "MI300"],
)
def test_kernels_fit(backend, architecture, shared):
    script = Path(__file__).with_name("compiled_kernels.py")
    ran = subprocess.run(
        [sys.executable, str(script), backend, architecture, str(shared)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    kernels = json.loads(ran.stdout)
    assert len({kernel["kernel"] for kernel in kernels}) >= 12
    assert not [kernel for kernel in kernels if kernel["shared"] > shared * 1024 or kernel["threads"] > 1024]
