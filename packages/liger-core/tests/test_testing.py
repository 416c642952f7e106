"""`liger.testing`: under pytest it decides how kernels run, elsewhere it changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

OPS = """
import os, torch
from liger.ops import launch, rms_norm
assert "TRITON_INTERPRET" not in os.environ and not launch.INTERPRETED
assert rms_norm(torch.ones(2, 64)).shape == (2, 64)
"""


@pytest.mark.parametrize("before", ["", "import liger.ops", "import torch, triton"])
def test_a_program_that_imports_it_runs_the_ops_as_before(before):
    if "triton" in before:
        pytest.importorskip("triton")
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_VERSION")}
    program = f"{before}\nimport liger.testing\n{OPS}"
    ran = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
