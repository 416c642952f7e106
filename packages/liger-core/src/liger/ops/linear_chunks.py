"""A head's linear layer in chunks of rows, so that its (M, V) logits never exist as a whole.

    logits = x Wᵀ + b        dx = dlogits W        dW = dlogitsᵀ x        db = Σ_rows dlogits

A chunk of logits is computed into a buffer, where the op puts its gradient in its place, and is used up in dx, dW and
db before the next one.

The products are matmuls of the compute dtype, which sum in fp32; db is summed in fp32 (fp64 for fp64). dW is summed
over the chunks in a dtype that the op chooses, rounded once a chunk. Of more chunks than `updates` allows it is summed
in fp32 and rounded at the end; so are, of more than two chunks, the rows of the most frequent classes. Of text, whose
few most frequent tokens are most of it, they are what the roundings would add up in.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_BYTES = 256 * 2**20
"""How much memory one chunk of logits may take: 1024 rows of 128256 in bf16."""

CPU_CHUNK_BYTES = 8 * 2**20
"""The same on a CPU, where the reference makes several tensors of a chunk's size."""

TILE = 128  # rows that the matmuls work on at once
LINE = 64  # columns: rows that start 128 bytes apart, or a multiple of that, are read and written 16 bytes at a time
UPDATES = 8  # the most that a sum in bf16 is rounded
FREQUENT = 1024  # classes whose rows of dW are summed in fp32 although the others are not
_SPARSE = 7  # more classes than so many times the rows
_ROWS_PER_UPDATE = 1280  # rows whose product with x takes longer than reading and writing dW
_WIDE_ROWS = 256  # rows of logits that may exist in fp32

_PASSING = re.compile(r"_(ALLOC_FAILED|NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR)|illegal memory access")
"""Of cuBLAS and of CUDA: what says nothing of what a GPU can do."""

Gradients = tuple[Tensor, Tensor, Tensor]
Needs = tuple[bool, bool, bool]
Spans = list[tuple[int, int]]


def updates(rows: int, columns: int) -> int:
    """How often a sum of dW in bf16 may be rounded for its error to stay within 1.5 times that of one product.

    8 times where the classes are many beside the rows: what a chunk adds to a class that is another's target is then
    mostly less than can change it. On a GPU 16384×2048×128256 has 1.48 times the error after 8 chunks, and
    16384×4096×32000 1.75 times after 4.
    """
    return UPDATES if columns > _SPARSE * rows else 2


def chunks(
    rows: int, columns: int, itemsize: int, weight_gradient_bytes: int = 0, chunk_bytes: int | None = None
) -> Spans:
    """(start, stop) of every chunk of rows, all of a size within one tile of 128 rows.

    A chunk takes at most `chunk_bytes` (CHUNK_BYTES). Where dW is computed, every chunk reads, adds to and rounds all
    of dW: there it may take as much memory as dW does, if it needs that for 1280 rows, or for 8 chunks in all. Where
    dW may be rounded only twice (see `updates`), it may take twice `chunk_bytes`, if two chunks need no more.
    """
    budget, row_bytes = chunk_bytes or CHUNK_BYTES, columns * itemsize
    most, half = budget // row_bytes, -(-rows // (2 * TILE)) * TILE
    if weight_gradient_bytes and updates(rows, columns) == 2 and half * row_bytes <= 2 * budget:
        most = max(most, half)
    elif weight_gradient_bytes:
        wanted = max(_ROWS_PER_UPDATE, -(-rows // UPDATES))
        most = max(most, min(wanted, weight_gradient_bytes // row_bytes))
    return edges(rows, most, TILE)


def edges(length: int, most: int, tile: int) -> Spans:
    """(start, stop) of parts of `length`: at most `most` each, of a size within one tile, where `most` holds one."""
    tile = tile if most >= tile else 1
    tiles = -(-length // tile)
    count = -(-tiles // max(most // tile, 1))
    cuts = [min(i * tiles // count * tile, length) for i in range(count + 1)] if count else []
    return list(itertools.pairwise(cuts))


def empty_logits(like: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(rows, columns) on the device of `like`, not yet filled; where columns are many, rows start at whole lines."""
    line = LINE if columns > 16 * LINE else 1
    return like.new_empty((rows, -(-columns // line) * line), dtype=dtype)[:, :columns]


def _parts(rows: int, columns: int) -> list[slice | None]:
    """The columns that are multiplied together; None: all.

    At 16384×4096×32001 cuBLAS takes 85 ms in the place of 19 for the three products of all columns. Those beside whole
    lines come first: what they add to dx is small, and rounded again.
    """
    whole = columns // LINE * LINE
    splits = rows >= TILE and 16 * LINE < whole < columns
    return [slice(whole, columns), slice(0, whole)] if splits else [None]


def _rows(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor[part]


def _columns(tensor: Tensor, part: slice | None) -> Tensor:
    return tensor if part is None else tensor[:, part]


@functools.cache
def _multiplies_into_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch sums a product of 16-bit matrices into fp32 there: on an NVIDIA GPU, with ROCm not in all versions.

    Tried out, since only the product itself tells.
    """
    if device.type != "cuda":
        return False
    a, total = (torch.zeros(16, 16, dtype=of, device=device) for of in (dtype, torch.float32))
    try:
        torch.addmm(total, torch.mm(a, a, out_dtype=torch.float32).to(dtype), a, out_dtype=torch.float32, out=total)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _PASSING.search(str(error)):
            raise
        return False
    return True


def project(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """`out` = x Wᵀ + b, all of one dtype."""
    for part in _parts(x.shape[0], weight.shape[0]):
        classes, logits = _rows(weight, part).t(), _columns(out, part)
        if bias is None:
            torch.mm(x, classes, out=logits)
        elif part is None or x.dtype.itemsize > 2 or not _multiplies_into_fp32(x.device, x.dtype):
            torch.addmm(_rows(bias, part), x, classes, out=logits)
        else:  # of whole lines cuBLAS would round the product, and then its sum with the bias once more
            for some, rounded in zip(x.split(_WIDE_ROWS), logits.split(_WIDE_ROWS), strict=True):
                rounded.copy_(torch.mm(some, classes, out_dtype=torch.float32).add_(_rows(bias, part)))


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`total` += a b, or = a b for the first, in the dtype of `total`.

    Where that is the dtype of a and b, cuBLAS may round the product before it adds it and rounds the sum.
    """
    if total.dtype == a.dtype and first:
        torch.mm(a, b, out=total)
    elif total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.dtype == torch.float32 and _multiplies_into_fp32(a.device, a.dtype):
        beta = 0 if first else 1  # with 0, what is in `total` is not read
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        product = torch.mm(a, b, out=a.new_empty(total.shape))  # with `out`, autocast of a backward has no say
        (total.copy_ if first else total.add_)(product)


def needed(input: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
    """Which of them want a gradient now."""
    on = torch.is_grad_enabled()
    return on and input.requires_grad, on and weight.requires_grad, on and bias is not None and bias.requires_grad


def empty_gradients(
    input: Tensor, weight: Tensor, needs: Needs, compute_dtype: torch.dtype, accum_dtype: torch.dtype
) -> Gradients:
    """dx, dW (in `accum_dtype`) and db (fp32 or fp64), not yet filled; of no elements where they are not needed."""
    needs_input, needs_weight, needs_bias = needs
    wide = torch.promote_types(compute_dtype, torch.float32)
    return (
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(weight.shape if needs_weight else (0,), dtype=accum_dtype),
        input.new_empty(weight.shape[0] if needs_bias else 0, dtype=wide),
    )


def through_chunks(
    input: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype,
    accum_dtype: torch.dtype, fill: Callable[[Tensor, slice], None], needs: Needs, *, labels: Tensor | None = None,
    buffers: int = 1, planned_columns: int | None = None,
) -> Gradients:  # fmt: skip
    """(dx, dW, db), from what `fill(logits, rows)` leaves in the place of the logits of every chunk.

    What is not needed has no elements. dW has the dtype `accum_dtype`. The rows of logits have memory to spare, up to
    `logits.stride(0)` columns.

    `labels`: (M,), the targets, which tell the frequent classes; what is out of range is none of a class. None: the
    first chunk's gradient tells them. `buffers`: how many tensors of the logits' size the op holds for a chunk.
    `planned_columns`: how many rows of the weight the chunks are planned for; where ranks hold parts of it, all must go
    through the same chunks.
    """
    needs_input, needs_weight, needs_bias = needs
    rows, columns = input.shape[0], weight.shape[0]
    budget = min(CPU_CHUNK_BYTES, CHUNK_BYTES) if input.device.type == "cpu" else None
    planned = planned_columns or columns
    beside = planned * input.shape[1] * accum_dtype.itemsize if needs_weight else 0
    parts = chunks(rows, planned, compute_dtype.itemsize * buffers, beside, budget)
    longest = max((stop - start for start, stop in parts), default=0)
    is_rounded_too_often = len(parts) > updates(rows, planned)
    sum_dtype = torch.promote_types(accum_dtype, torch.float32) if is_rounded_too_often else accum_dtype
    dx, dw, db = empty_gradients(input, weight, needs, compute_dtype, sum_dtype)
    if not rows:
        return dx, dw.zero_(), db.zero_()

    is_summed_apart = needs_weight and sum_dtype.itemsize == 2 and len(parts) > 2
    buffer = empty_logits(input, longest, columns, compute_dtype)
    w = weight.to(compute_dtype)
    b = None if bias is None else bias.to(compute_dtype)
    for start, stop in parts:
        x = input[start:stop].to(compute_dtype)
        logits = buffer[: stop - start]
        project(x, w, b, logits)
        fill(logits, slice(start, stop))
        for number, part in enumerate(_parts(stop - start, columns)):
            gradient = _columns(logits, part)
            if needs_input:
                add_product(dx[start:stop], gradient, _rows(w, part), first=number == 0)
            if needs_weight:
                add_product(_rows(dw, part), gradient.t(), x, first=start == 0)
        if is_summed_apart and start == 0:
            often = _most_frequent(labels, logits)
            apart = input.new_empty((len(often), input.shape[1]), dtype=torch.float32)
        if is_summed_apart:
            add_product(apart, logits.index_select(1, often).t(), x, first=start == 0)
        if needs_bias and start == 0:
            torch.sum(logits, 0, dtype=db.dtype, out=db)
        elif needs_bias:
            db += logits.sum(0, dtype=db.dtype)
    del buffer, logits, gradient  # before there is a dW of another dtype
    if is_summed_apart:
        dw.index_copy_(0, often, apart.to(dw.dtype))
    return dx, dw.to(accum_dtype), db


def _most_frequent(labels: Tensor | None, gradient: Tensor) -> Tensor:
    """The FREQUENT classes that are most often among labels, found without waiting for the GPU.

    Without labels those whose columns are largest in `gradient`, (some of the rows, V).
    """
    classes = gradient.shape[1]
    if labels is None:
        weights = torch.linalg.vector_norm(gradient, dim=0, dtype=torch.float32)
    else:
        there = (labels >= 0) & (labels < classes)
        weights = labels.new_zeros(classes + 1, dtype=torch.int32)
        weights.scatter_add_(0, torch.where(there, labels, classes).long(), there.int())
    return weights[:classes].topk(min(FREQUENT, classes), sorted=False).indices


def given(
    gradients: Gradients, needs: Needs, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients as autograd takes them: in the dtypes of the parameters, None where they are not needed."""
    dx, dw, db = gradients
    return (
        dx if needs[0] else None,
        dw.to(weight.dtype) if needs[1] else None,
        db.to(bias.dtype) if needs[2] and bias is not None else None,
    )
