r"""LayerNorm (Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450), with a weight, a bias, both, or neither.

For one row x of N elements:

    μ   = mean(x)        r = 1 / sqrt(mean((x − μ)²) + eps)        x̂ = (x − μ) · r
    y   = w · x̂ + b
    dx  = r · (g − mean(g) − x̂ · mean(g · x̂))                      g = w · dy
    dw  = Σ_rows dy · x̂        db = Σ_rows dy

All of it runs in fp32 and is rounded once: y to x's dtype, whatever the dtype of weight and bias.

μ and r (fp32, one each per row) and `x` are kept for backward. The weight's and the bias's gradients are summed by a
fixed number of programs, each over its own rows, and then over the programs: no atomics, so the same input gives the
same bits. Few elements are torch's (see `FEW_ELEMENTS`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.ops.column_sums import column_sums
from liger.ops.constant import constant
from liger.ops.launch import jit, launch, next_power_of_2, runs_kernels, sm_count, tl
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable

FEW_ELEMENTS = 2**20
"""Up to so many, on a GPU, torch's own layer_norm: the host's time is what counts there, and its autograd is C++."""

_MAX_COLUMNS = 16384
_TILE = 4096  # elements a program holds at once when rows are short
_WIDE = 8192  # in backward, more columns leave no registers for the weight
_FETCHED = 65536  # bytes of shared memory a backward program may take for dy and x of its next rows


def reference(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`layer_norm` in plain torch: the specification, and what devices without Triton run."""
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = None if weight is None else weight.to(compute)
    bias = None if bias is None else bias.to(compute)
    return F.layer_norm(x.to(compute), x.shape[-1:], weight, bias, eps).to(x.dtype)


@jit(varying=("rows",))
def _forward_kernel(
    x, weight, bias, y, statistics, rows, columns, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    at = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]

    x32 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    mu = tl.sum(x32, axis=1) / columns
    centred = tl.where(inside, x32 - mu[:, None], 0.0)  # a padded lane is −μ after the subtraction
    r = tl.rsqrt((tl.sum(centred * centred, axis=1) / columns + eps).to(tl.float32))  # inductor hands eps over in fp64
    tl.store(statistics + row, mu, mask=row < rows)
    tl.store(statistics + rows + row, r, mask=row < rows)
    out = centred * r[:, None]
    if HAS_WEIGHT:
        out = out * tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        out = out + tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@jit(varying=("rows",))
def _backward_kernel(
    dy, x, weight, statistics, dx, partial, rows, columns, NEEDS_DX: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    NEEDS_DW: tl.constexpr, NEEDS_DB: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, RELOADS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    if HAS_WEIGHT and not RELOADS:
        scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
    dw_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    db_sum = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)

    # The sums below fill the registers, so few programs fit: the next rows are fetched while one is worked on.
    for first in tl.range(program * BLOCK_ROWS, rows, tl.num_programs(0) * BLOCK_ROWS, num_stages=STAGES):
        row = first + tl.arange(0, BLOCK_ROWS)
        at = row[:, None] * columns + column[None, :]
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        x32 = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(statistics + row, mask=row < rows, other=0.0)
        r = tl.load(statistics + rows + row, mask=row < rows, other=0.0)
        x_hat = (x32 - mu[:, None]) * r[:, None]  # not 0 in a padded lane, but g is, in every sum and product below
        if NEEDS_DW:
            dw_sum += g * x_hat
        if NEEDS_DB:
            db_sum += g
        if NEEDS_DX:
            if HAS_WEIGHT:
                if RELOADS:
                    scale = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
                g = g * scale[None, :]
            shift = tl.sum(g, axis=1) / columns
            projection = tl.sum(g * x_hat, axis=1) / columns
            out = r[:, None] * (g - shift[:, None] - x_hat * projection[:, None])
            tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)

    sums = program * (NEEDS_DW + NEEDS_DB)
    if NEEDS_DW:
        tl.store(partial + sums * columns + column, tl.sum(dw_sum, axis=0), mask=column < columns)
    if NEEDS_DB:
        tl.store(partial + (sums + NEEDS_DW) * columns + column, tl.sum(db_sum, axis=0), mask=column < columns)


def _tile(columns: int, backward: bool) -> tuple[int, int, int]:
    """(rows, columns, warps) of what a program works on at once."""
    block_columns = next_power_of_2(columns)
    block_rows = max(1, _TILE // block_columns)
    if backward and block_columns > _WIDE:
        return block_rows, block_columns, 8
    return block_rows, block_columns, min(max(block_rows * block_columns // 512, 4), 16)


def _launch_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """y, and μ and r of the rows as the two rows of one tensor."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    y = torch.empty_like(x)
    statistics = x.new_empty(2, rows, dtype=torch.float32)
    block_rows, block_columns, warps = _tile(columns, backward=False)
    if rows:
        launch(
            _forward_kernel, (-(-rows // block_rows),), x, weight, bias, y, statistics, rows, columns, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns, num_warps=warps,
        )  # fmt: skip
    return y, statistics


def _launch_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, needs_dx: bool, dw_dtype: torch.dtype | None,
    db_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of x, weight and bias; those of the latter where there is a dtype for them."""
    columns = x.shape[-1]
    rows = x.numel() // columns
    block_rows, block_columns, warps = _tile(columns, backward=True)
    dtypes = [dtype for dtype in (dw_dtype, db_dtype) if dtype is not None]
    programs = -(-rows // block_rows)
    if dtypes:
        programs = min(programs, 2 * sm_count(x))
    dx = torch.empty_like(x) if needs_dx else None
    partial = x.new_empty(programs, len(dtypes), columns, dtype=torch.float32) if dtypes else None
    if rows and (needs_dx or dtypes):
        launch(
            _backward_kernel, (programs,), dy, x, weight, statistics, dx, partial, rows, columns,
            NEEDS_DX=needs_dx, HAS_WEIGHT=weight is not None, NEEDS_DW=dw_dtype is not None,
            NEEDS_DB=db_dtype is not None, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns,
            STAGES=min(max(_FETCHED // (2 * block_rows * block_columns * x.element_size()), 1), 3),
            RELOADS=block_columns > _WIDE, num_warps=warps,
        )  # fmt: skip
    if partial is None:
        return dx, None, None
    sums = column_sums(partial, *dtypes)
    return dx, sums[0] if dw_dtype is not None else None, sums[-1] if db_dtype is not None else None


@named("layer_norm")
class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        y, statistics = _launch_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, statistics)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, statistics = ctx.saved_tensors
        needs_dx, needs_dw, needs_db = ctx.needs_input_grad[:3]
        dw_dtype, db_dtype = weight.dtype if needs_dw else None, ctx.bias_dtype if needs_db else None
        return *_launch_backward(dy.contiguous(), x, weight, statistics, needs_dx, dw_dtype, db_dtype), None


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Shift and scale the last dimension of `x` to mean 0 and variance 1, then multiply by `weight` and add `bias`.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64. More than 16384 columns take the reference.
        weight: (N,), any of these dtypes, on x's device; None for no scale.
        bias: (N,), likewise; None for no shift.
        eps: added to the variance.

    Returns:
        (..., N), in x's dtype.

    Raises:
        ValueError: `x` has no dimension, or `weight` or `bias` another shape or device than its last one, or `eps` is a
            tensor that requires a gradient.
        TypeError: `x`, `weight` or `bias` is not a floating-point tensor.
    """
    if not x.is_floating_point():
        raise TypeError(f"layer_norm: x must have a floating-point dtype, not {x.dtype}")
    if not x.dim():
        raise ValueError("layer_norm: x has no dimension to normalise")
    if weight is not None:
        _check_parameter("weight", weight, x)
    if bias is not None:
        _check_parameter("bias", bias, x)
    eps = constant("layer_norm", "eps", eps)
    if runs_kernels(x, weight, bias) and 0 < x.shape[-1] <= _MAX_COLUMNS:
        if _are_few(x, weight, bias):
            return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
        weight = None if weight is None else weight.contiguous()
        bias = None if bias is None else bias.contiguous()
        return _LayerNorm.apply(x.contiguous(), weight, bias, eps)
    return reference(x, weight, bias, eps)


def _are_few(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether torch's layer_norm is the faster one. It takes one dtype, and autocast changes that of its result."""
    # in this order: a graph must not depend on how many there are
    few = not torch.compiler.is_compiling() and x.is_cuda and x.numel() <= FEW_ELEMENTS
    alike = (weight is None or weight.dtype == x.dtype) and (bias is None or bias.dtype == x.dtype)
    return few and alike and not torch.is_autocast_enabled("cuda")


def _check_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"layer_norm: {name} has shape {tuple(parameter.shape)}, expected x's last dimension {tuple(x.shape[-1:])}"
        )
    if parameter.device != x.device:
        raise ValueError(f"layer_norm: {name} is on {parameter.device}, expected x's device {x.device}")
    if not parameter.is_floating_point():
        raise TypeError(f"layer_norm: {name} must have a floating-point dtype, not {parameter.dtype}")
