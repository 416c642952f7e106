"""What backward kernels ask of a multiprocessor, as Triton compiles them for a GPU that has less than an H100."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

_COMPILED = """
import importlib, json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

norm = importlib.import_module("liger.ops.rms_norm")
TYPES = {2: "*bf16", 4: "*fp32"}
limit = 99 * 1024
found = {}
for columns, dy, x, dtotal in json.loads(sys.argv[1]):
    rows, width, warps = norm._tile(columns, backward=True)
    stages = norm._stages(rows * width * (dy + x + dtotal), limit - 1024)
    types = {"dy": TYPES[dy], "x": TYPES[x], "weight": TYPES[dy], "dx": TYPES[x], "dw": "*fp32", "rows": "i32",
             "columns": "i32", "eps": "fp32"}
    constants = {"OFFSET": 0.0, "HAS_DTOTAL": bool(dtotal), "NEEDS_DX": True, "HAS_WEIGHT": True, "NEEDS_DW": True,
                 "BLOCK_ROWS": rows, "BLOCK_COLUMNS": width, "STAGES": stages, "RELOADS": False}
    if dtotal:
        types["dtotal"] = TYPES[dtotal]
    else:
        constants["dtotal"] = None
    kernel = norm._backward_kernel
    names = kernel.arg_names
    aligned = {name for name in (*types, "columns") if name not in ("rows", "eps")}
    source = ASTSource(
        kernel,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": warps})
    found[f"{columns} {dy} {x} {dtotal}"] = [stages, compiled.metadata.shared]
print(json.dumps(found))
"""


def test_rms_norms_backward_fits_the_99_kib_of_an_rtx_or_an_l4():
    """Of fp32, of fp32 weights with bf16 rows, with a residual, and of bf16, which alone waits in three stages."""
    cases = [(2048, 4, 4, 0), (4096, 4, 2, 2), (8192, 4, 4, 4), (4096, 2, 2, 0)]
    ran = subprocess.run(
        [sys.executable, "-c", _COMPILED, json.dumps(cases)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == len(cases)
    assert all(shared <= 99 * 1024 for _, shared in found.values()), found
    assert found["4096 2 2 0"][0] == 3
