"""The last step of a norm's weight gradient: every program has summed its own rows, and this sums over the programs.

Fixed programs, each over its own rows, then this: no atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger.ops.launch import jit, launch, tl

_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 32  # a row of 32 columns is one 128-byte access


@jit(varying=("rows",))
def _kernel(partial, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < columns)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the columns of `partial` (P, N) in fp32, rounded once to `dtype`: (N,)."""
    rows, columns = partial.shape
    out = torch.empty(columns, dtype=dtype, device=partial.device)
    launch(
        _kernel, (-(-columns // _BLOCK_COLUMNS),), partial, out, rows, columns,
        BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out
