"""The environment of a process that a test starts, and in which the kernels would only be slow."""

from __future__ import annotations

import os

REFERENCES = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
"""Without a GPU the ops run their references, on one core."""
