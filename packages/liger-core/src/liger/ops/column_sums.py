"""The last step of a norm's weight gradient: every program has summed its own rows, and this sums over the programs.

Fixed programs, each over its own rows, then this: no atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger.ops.launch import jit, launch, next_power_of_2, tl

_COLUMNS = 32  # of a program: a row of them is one 128-byte access


@jit(varying=())
def _kernel(partial, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(partial + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(x, axis=0).to(out.dtype.element_ty), mask=column < columns)


def column_sums(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums of the columns of `partial` (P, N) in fp32, rounded once to `dtype`: (N,)."""
    rows, columns = partial.shape
    out = torch.empty(columns, dtype=dtype, device=partial.device)
    block_rows = next_power_of_2(max(rows, 1))
    launch(
        _kernel, (-(-columns // _COLUMNS),), partial, out, rows, columns,
        BLOCK_ROWS=block_rows, BLOCK_COLUMNS=_COLUMNS, num_warps=4 if block_rows <= 128 else 8,
    )  # fmt: skip
    return out
