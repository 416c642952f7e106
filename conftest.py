"""What tests leave to each other: pytest-xdist's workers the cores, and each test products in full fp32."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if workers > 1:  # torch takes one worker's share in each
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def full_fp32_products() -> Iterator[None]:
    """Accelerate and the Trainer allow TF32 for the rest of the process when they compile an fp32 model on a GPU."""
    yield
    backends = torch.backends
    if getattr(backends, "fp32_precision", "none") == "tf32":
        backends.fp32_precision = "none"
    if getattr(backends.cuda.matmul, "fp32_precision", "tf32") == "tf32":
        backends.cuda.matmul.allow_tf32 = False
