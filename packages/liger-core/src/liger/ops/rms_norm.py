r"""RMSNorm (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467), with a weight, an offset, or neither.

For one row x of N elements, with s = offset + weight:

    r   = 1 / sqrt(mean(x²) + eps)           x̂ = x · r
    y   = s · x̂
    dx  = r · (g − x̂ · mean(g · x̂))          g = s · dy
    dw  = Σ_rows dy · x̂

All of it runs in fp32. `cast` says where the forward rounds:

    "llama"   x̂ is rounded to x's dtype, then multiplied by s: the result has the promoted dtype of x and weight
    "gemma"   s · x̂ is rounded once, to x's dtype

Only `x` and `weight` are kept for backward, which computes `r` again from the row that it reads anyway. The weight's
gradient is summed by a fixed number of programs, each over its own rows, and then over the programs: see `column_sums`.

The kernels also take a residual and its gradient, for `add_rms_norm`: they are read and added where they are given.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from liger.ops.column_sums import column_sums
from liger.ops.constant import constant
from liger.ops.launch import jit, launch, next_power_of_2, runs_kernels, shared_bytes, sm_count, tl
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable

Cast = Literal["llama", "gemma"]

MAX_COLUMNS = 65536
_SHORT = 1024  # rows up to this many columns are taken several at a time
_WIDE = 8192  # in backward, more columns leave no registers for the weight, nor for rows that are fetched early


def reference(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, cast: Cast = "llama"
) -> Tensor:
    """`rms_norm` in plain torch: the specification, and what devices without Triton run."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x_hat = x.to(compute)
    x_hat = x_hat * torch.rsqrt(x_hat.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return x_hat.to(x.dtype)
    if cast == "llama":
        scale = weight + offset if offset else weight
        return scale * x_hat.to(x.dtype)
    return (x_hat * (offset + weight.to(compute))).to(x.dtype)


@jit(varying=("rows",))
def _forward_kernel(
    x, residual, weight, y, total, rows, columns, eps, OFFSET: tl.constexpr, LLAMA: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]

    x_in = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        x_in = (x_in.to(tl.float32) + added).to(total.dtype.element_ty)
        tl.store(total + at, x_in, mask=inside)
    x32 = x_in.to(tl.float32)
    r = tl.rsqrt((tl.sum(x32 * x32, axis=1) / columns + eps).to(tl.float32))  # inductor hands eps over in fp64
    out = x32 * r[:, None]
    if LLAMA:
        out = out.to(x_in.dtype).to(tl.float32)
    if HAS_WEIGHT:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + OFFSET
        out = out * scale[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@jit(varying=("rows",))
def _backward_kernel(
    dy, dtotal, x, weight, dx, dw, rows, columns, eps, OFFSET: tl.constexpr, HAS_DTOTAL: tl.constexpr,
    NEEDS_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr, NEEDS_DW: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr, STAGES: tl.constexpr, RELOADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    if HAS_WEIGHT and not RELOADS:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + OFFSET
    dw_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)

    # The sum below fills the registers, so few programs fit: the next rows are fetched while one is worked on.
    for first in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_ROWS)
        at = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        x32 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(x32 * x32, axis=1) / columns + eps).to(tl.float32))
        r = tl.where(row < rows, r, 0.0)  # a row that is not there would be 0 · inf without an eps
        x_hat = x32 * r[:, None]
        if NEEDS_DW:
            dw_sum += g * x_hat
        if NEEDS_DX:
            if HAS_WEIGHT:
                if RELOADS:
                    scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32) + OFFSET
                g = g * scale[None, :]
            projection = tl.sum(g * x_hat, axis=1) / columns
            out = r[:, None] * (g - x_hat * projection[:, None])
            if HAS_DTOTAL:
                out += tl.load(dtotal + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)

    if NEEDS_DW:
        tl.store(dw + program * columns + column, tl.sum(dw_sum, axis=0), mask=column < columns)


def _tile(columns: int, backward: bool) -> tuple[int, int, int]:
    """(rows, columns, warps) of what a program works on at once."""
    block_columns = next_power_of_2(columns)
    if columns <= _SHORT:
        return 2048 // block_columns, block_columns, 4
    warps = 8 if block_columns <= _WIDE else 32
    return max(8192 // block_columns, 1) if backward else 1, block_columns, warps


def _stages(tile_bytes: int, shared: int) -> int:
    """Tiles of all tensors that are read: the one that is worked on, and those that wait in shared memory.

    There is one program to a multiprocessor (three for short rows), so one may have nearly all of it.
    """
    return max(1, min(3, 200 * 1024 // tile_bytes, 1 + shared // tile_bytes))


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float, cast: Cast
) -> tuple[Tensor, Tensor | None]:
    """The norm of x, or of x + residual and that sum as well. All contiguous."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    total = None
    dtype = x.dtype
    if residual is not None:
        dtype = torch.promote_types(dtype, residual.dtype)
        total = torch.empty_like(x, dtype=dtype)
    if weight is not None and cast == "llama":
        dtype = torch.promote_types(dtype, weight.dtype)
    y = torch.empty_like(x, dtype=dtype)
    block_rows, block_columns, warps = _tile(columns, backward=False)
    if rows:
        launch(
            _forward_kernel, (-(-rows // block_rows),), x, residual, weight, y, total, rows, columns, eps,
            OFFSET=offset, LLAMA=cast == "llama", HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=warps,
        )  # fmt: skip
    return y, total


def launch_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float,
    needs_dx: bool, needs_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, `dtotal` added, and of the weight. All contiguous."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    block_rows, block_columns, warps = _tile(columns, backward=True)
    itemsize = dy.element_size() + x.element_size() + (0 if dtotal is None else dtotal.element_size())
    stages = _stages(block_rows * block_columns * itemsize, shared_bytes(x)) if block_columns <= _WIDE else 1
    programs = -(-rows // block_rows)
    if needs_dw:
        programs = min(programs, (3 if columns <= _SHORT else 1) * sm_count(x))
    dx = torch.empty_like(x) if needs_dx else None
    dw = x.new_empty(programs, columns, dtype=torch.float32) if needs_dw else None
    if rows:
        launch(
            _backward_kernel, (programs,), dy, dtotal, x, weight, dx, dw, rows, columns, eps,
            OFFSET=offset, HAS_DTOTAL=dtotal is not None, NEEDS_DX=needs_dx, HAS_WEIGHT=weight is not None,
            NEEDS_DW=needs_dw, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
            STAGES=stages, RELOADS=block_columns > _WIDE, num_warps=warps,
        )  # fmt: skip
    return dx, None if dw is None or weight is None else column_sums(dw, weight.dtype)[0]


@named("rms_norm")
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast: Cast) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return launch_forward(x, None, weight, eps, offset, cast)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_dx, needs_dw = ctx.needs_input_grad[:2]
        dx, dw = launch_backward(dy.contiguous(), None, x, weight, ctx.eps, ctx.offset, needs_dx, needs_dw)
        return dx, dw, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, cast: Cast = "llama"
) -> Tensor:
    """Normalise the last dimension of `x` by its root mean square and scale it by `offset + weight`.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64. More than 65536 columns take the reference.
        weight: (N,), any of these dtypes, on x's device; None for no scale.
        eps: added to the mean of squares.
        offset: added to the weight before it multiplies (Gemma's norms: 1.0).
        cast: where the forward rounds, "llama" or "gemma" (see the module's docstring).

    Returns:
        (..., N), in x's dtype; with `cast="llama"` in the promoted dtype of x and weight.

    Raises:
        ValueError: `x` has no dimension, `weight` another shape or device than its last one, `cast` is unknown, or
            `eps` or `offset` is a tensor that requires a gradient.
        TypeError: `x` or `weight` is not a floating-point tensor.
    """
    check(x, weight, cast, "rms_norm")
    eps, offset = constant("rms_norm", "eps", eps), constant("rms_norm", "offset", offset)
    if runs_kernels(x, weight) and 0 < x.shape[-1] <= MAX_COLUMNS:
        weight = None if weight is None else weight.contiguous()
        return _RMSNorm.apply(x.contiguous(), weight, eps, offset, cast)
    return reference(x, weight, eps, offset=offset, cast=cast)


def check(x: Tensor, weight: Tensor | None, cast: str, op: str) -> None:
    """Raise what `rms_norm` raises, in the name of `op`."""
    if not x.is_floating_point():
        raise TypeError(f"{op}: x must have a floating-point dtype, not {x.dtype}")
    if not x.dim():
        raise ValueError(f"{op}: x has no dimension to normalise")
    if cast not in ("llama", "gemma"):
        raise ValueError(f"{op}: cast must be 'llama' or 'gemma', not {cast!r}")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: weight has shape {tuple(weight.shape)}, expected x's last dimension {tuple(x.shape[-1:])}"
            )
        if weight.device != x.device:
            raise ValueError(f"{op}: weight is on {weight.device}, expected x's device {x.device}")
        if not weight.is_floating_point():
            raise TypeError(f"{op}: weight must have a floating-point dtype, not {weight.dtype}")
