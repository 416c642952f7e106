"""The gradients of a head's linear layer in slices of its classes, for an op that knows what each row's depend on.

    dx = Σ_slices dlogits W        dW = dlogitsᵀ x        db = Σ_rows dlogits

The logits of one slice of classes are computed into a buffer, where the op puts their gradient in their place. Where
all rows fit one block, each row of dW is then one product, written once, where `linear_chunks` reads, adds to and
rounds all of dW for each of its chunks of rows; where they do not, dW is rounded twice (of fp16 it is summed in fp32).
dx is summed over the slices in fp32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from liger.ops import linear_chunks
from liger.ops.linear_chunks import (
    CPU_CHUNK_BYTES,
    LINE,
    TILE,
    Gradients,
    Needs,
    Spans,
    add_product,
    edges,
    empty_gradients,
    empty_logits,
)


def grid(rows: int, width: int, columns: int, itemsize: int, memory: int) -> tuple[Spans, Spans]:
    """(start, stop) of every block of rows, and of every slice of columns that each block goes through.

    dx of a block, in fp32, takes at most `memory` bytes, unless that made more than two blocks: a sum of dW in 16 bits
    loses digits with each. It and the logits of a slice together take one and a half times as many, where that leaves
    the logits between a half and the whole of `memory`. Columns beside whole lines of 64 are a slice of their own,
    since cuBLAS is slow where rows start anywhere.
    """
    blocks = edges(rows, max(memory // (4 * width), -(-rows // 2), 1), 1)
    longest = max((stop - start for start, stop in blocks), default=1)
    spare = min(max(memory * 3 // 2 - longest * width * 4, memory // 2), memory)
    whole = columns // LINE * LINE if columns > 16 * LINE else columns
    slices = edges(whole, max(spare // (longest * itemsize), LINE), TILE)
    return blocks, slices + ([(whole, columns)] if whole < columns else [])


def through_slices(
    input: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype,
    fill: Callable[[Tensor, slice, int], None], needs: Needs,
) -> Gradients:  # fmt: skip
    """(dx, dW, db), from what `fill(logits, rows, first_class)` leaves in the place of the logits of every slice.

    What is not needed has no elements. db is fp32 (fp64 for fp64), the others have the dtypes of input and weight.
    """
    needs_input, needs_weight, needs_bias = needs
    rows, width = input.shape
    wide = torch.promote_types(compute_dtype, torch.float32)
    memory = linear_chunks.CHUNK_BYTES
    memory = min(CPU_CHUNK_BYTES, memory) if input.device.type == "cpu" else memory
    blocks, slices = grid(rows, width, weight.shape[0], compute_dtype.itemsize, memory)
    # a sum of fp16 needs fp32's range: a loss scaler's gradients are large, others smaller than fp16's least
    is_wide = weight.dtype == torch.float16 and len(blocks) > 1
    sum_dtype = torch.float32 if is_wide else weight.dtype
    dx, dw, db = empty_gradients(input, weight, (needs_input and not rows, *needs[1:]), compute_dtype, sum_dtype)
    if not rows:
        return dx, dw.zero_(), db.zero_()

    w = weight.to(compute_dtype)
    b = None if bias is None else bias.to(compute_dtype)
    for start, stop in blocks:
        x = input[start:stop].to(compute_dtype)
        total = input.new_empty(x.shape if needs_input else (0,), dtype=wide if len(slices) > 1 else input.dtype)
        buffer = empty_logits(input, stop - start, max(last - first for first, last in slices), compute_dtype)
        for first, last in slices:
            logits, rows_of_w = buffer[:, : last - first], w[first:last]
            if b is None:
                torch.mm(x, rows_of_w.t(), out=logits)
            else:
                torch.addmm(b[first:last], x, rows_of_w.t(), out=logits)
            fill(logits, slice(start, stop), first)
            if needs_input:
                add_product(total, logits, rows_of_w, first=first == 0)
            if needs_weight:
                add_product(dw[first:last], logits.t(), x, first=start == 0)
            if needs_bias and start == 0:
                torch.sum(logits, 0, dtype=wide, out=db[first:last])
            elif needs_bias:
                db[first:last] += logits.sum(0, dtype=wide)
        del buffer, logits  # before there is a dx
        if needs_input and len(blocks) == 1:
            dx = total.to(input.dtype)
        elif needs_input:
            dx = dx if start else input.new_empty(input.shape)
            dx[start:stop] = total
    return dx, dw.to(weight.dtype), db
