r"""The sum of a sublayer's output and the residual, and the RMSNorm of that sum, in one pass.

For one row x, with its residual:

    t   = x + residual                        rounded to the promoted dtype of the two, as torch's sum is
    y   = rms_norm(t)                         the formulas, casts and kernels of `rms_norm`
    dx  = dresidual = d rms_norm(t) + dt      in fp32, rounded once; dt is the gradient that t has from elsewhere

Forward reads x and residual and writes y and t. Backward reads dy, dt and t, and writes one tensor, which is the
gradient of both inputs, as that of torch's own sum is: autograd adds in place only to what nobody else holds.

t is the caller's, and kept for backward all the same, which no other op does with an output. Keeping x and residual
instead, to add them again, would cost the read of one more tensor (9 in place of 8) and keep one more alive for every
norm of a model. Autograd watches what is kept: after `t.mul_(2)` backward raises, it never takes the new t for the old.
A model that changes the sum in place after its norm wants `x + residual` and `rms_norm`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger.ops.constant import constant
from liger.ops.launch import runs_kernels
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.rms_norm import MAX_COLUMNS, Cast, check, launch_backward, launch_forward
from liger.ops.rms_norm import reference as reference_norm


def reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain torch: the specification, and what devices without Triton run."""
    total = x + residual
    return reference_norm(total, weight, eps, offset=offset, cast=cast), total


@named("add_rms_norm")
class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, cast: Cast
    ) -> tuple[Tensor, Tensor | None]:
        y, total = launch_forward(x.contiguous(), residual.contiguous(), weight, eps, offset, cast)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.x_dtype, ctx.residual_dtype = eps, offset, x.dtype, residual.dtype
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        of_x, of_residual, needs_dw = ctx.needs_input_grad[:3]
        needs_dx = of_x or of_residual
        dx, dw = dtotal, None
        if dy is not None:
            total, weight = ctx.saved_tensors
            added = dtotal.contiguous() if dtotal is not None and needs_dx else None
            dx, dw = launch_backward(dy.contiguous(), added, total, weight, ctx.eps, ctx.offset, needs_dx, needs_dw)
        if dx is None:
            return None, None, dw, None, None, None
        dresidual = _cast(dx, ctx.residual_dtype) if of_residual else None
        return _cast(dx, ctx.x_dtype) if of_x else None, dresidual, dw, None, None, None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
) -> tuple[Tensor, Tensor]:
    """Add `x` to `residual`, and normalise the sum as `rms_norm` does.

    Args:
        x: (..., N), fp32, bf16, fp16 or fp64: what a sublayer adds to the residual.
        residual: as x, of the same shape.
        weight, eps, offset, cast: as in `rms_norm`.

    Returns:
        The normalised sum, and the sum itself: the next residual. Both (..., N), in the promoted dtype of x and
        residual; with `cast="llama"` the first in that of weight as well. Backward needs the sum as it is, and raises
        if it was changed in place.

    Raises:
        ValueError: `residual` has another shape or device than x, or as `rms_norm`.
        TypeError: `residual` is not a floating-point tensor, or as `rms_norm`.
    """
    check(x, weight, cast, "add_rms_norm")
    if residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: residual has shape {tuple(residual.shape)}, expected x's shape {tuple(x.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"add_rms_norm: residual is on {residual.device}, expected x's device {x.device}")
    if not residual.is_floating_point():
        raise TypeError(f"add_rms_norm: residual must have a floating-point dtype, not {residual.dtype}")
    eps, offset = constant("add_rms_norm", "eps", eps), constant("add_rms_norm", "offset", offset)
    if runs_kernels(x, residual, weight) and 0 < x.shape[-1] <= MAX_COLUMNS:
        weight = None if weight is None else weight.contiguous()
        return _AddRMSNorm.apply(x, residual, weight, eps, offset, cast)
    return reference(x, residual, weight, eps, offset=offset, cast=cast)
