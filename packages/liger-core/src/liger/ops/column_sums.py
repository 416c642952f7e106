"""The last step of a norm's weight gradient: every program has summed its own rows, and this sums over the programs.

Fixed programs, each over its own rows, then this: no atomics, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger.ops.launch import jit, launch, tl

_BLOCK_ROWS, _BLOCK_COLUMNS = 64, 32  # a row of 32 columns is one 128-byte access


@jit(varying=("rows",))
def _kernel(partial, out, out2, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    part = tl.program_id(0) // blocks  # 0 sums into `out`, 1 into `out2`
    column = (tl.program_id(0) - part * blocks) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    partial += part * columns + column[None, :]
    parts: tl.constexpr = 1 if out2 is None else 2
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(partial + row[:, None] * (parts * columns), mask=inside, other=0.0)
    sums = tl.sum(total, axis=0)
    if part == 0:
        tl.store(out + column, sums.to(out.dtype.element_ty), mask=column < columns)
    elif out2 is not None:
        tl.store(out2 + column, sums.to(out2.dtype.element_ty), mask=column < columns)


def column_sums(partial: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """The sums over the first dimension of `partial`, (P, N) or (P, 2, N) in fp32, rounded once: (N,) for each."""
    rows, columns = partial.shape[0], partial.shape[-1]
    outs = [partial.new_empty(columns, dtype=dtype) for dtype in dtypes]
    launch(
        _kernel, (len(outs) * -(-columns // _BLOCK_COLUMNS),), partial, outs[0], outs[1] if len(outs) == 2 else None,
        rows, columns, BLOCK_ROWS=_BLOCK_ROWS, BLOCK_COLUMNS=_BLOCK_COLUMNS, num_warps=4,
    )  # fmt: skip
    return outs
