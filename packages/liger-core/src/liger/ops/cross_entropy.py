r"""Cross entropy of a softmax, with label smoothing, z-loss, a softcap and a scale on the logits.

    loss      = Σ_rows loss_row / denominator
    dlogits   = (upstream / denominator) · dloss_row

The formulas of a row stand in `loss_rows`. They run in fp32; the losses of the rows (fp32) are summed by torch: no
atomics, so the same input gives the same bits.

The gradient is computed in forward, already divided, by the kernel that has just read the row. Backward has only the
upstream scalar left to multiply, which is mostly exactly 1. A second backward through the same graph computes the
gradient again from the logits. `reduction="none"` has an upstream gradient per row: forward keeps two numbers per row,
and backward does the gradient.
"""

from __future__ import annotations

import math
import operator
from typing import Any, Literal

import torch
from torch import Tensor

from liger.ops.constant import constant, refuse_learned
from liger.ops.launch import may_look_at, runs_kernels
from liger.ops.loss_rows import Options, fill_rows, reference_rows
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.scaling import Scaling
from liger.ops.upstream_scale import early_and_late, scaled

Reduction = Literal["mean", "sum", "none"]


def reference(
    logits: Tensor, target: Tensor, options: Options, reduction: Reduction, denominator: Tensor | None
) -> Tensor:
    """`cross_entropy` of (M, V) logits in plain torch: the specification, and what devices without Triton run."""
    loss = reference_rows(logits, target, options)
    return reduced(loss, reduction, denominator)


def reduced(loss: Tensor, reduction: Reduction, denominator: Tensor | None) -> Tensor:
    """The rows' losses summed and divided. Without any counted label: torch's NaN for the mean's own count, else 0."""
    if reduction == "none":
        return loss
    total = loss.sum()
    if denominator is None:
        return total
    if not denominator.is_floating_point():  # the mean's own count
        return total / denominator
    return total / torch.where((total == 0) & (denominator == 0), 1.0, denominator)


def divisor(
    denominator: float | Tensor | None, reduction: Reduction, target: Tensor, ignore_index: int, like: Tensor
) -> Tensor | None:
    """What the sum is divided by, 0-d, on the device of `like`: floating-point if given, else the mean's count."""
    if denominator is None:
        return (target != ignore_index).sum() if reduction == "mean" else None
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(denominator, Tensor):
        return denominator.detach().reshape(()).to(device=like.device, dtype=dtype, non_blocking=True)
    return torch.full((), denominator, device=like.device, dtype=dtype)


def _rows(logits: Tensor) -> Tensor:
    """(..., V) logits as (M, V), copied only when their columns are not contiguous or a row stride cannot do it."""
    rows = logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


@named("cross_entropy")
class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, denominator: Tensor | None, options: Options, reduction: Reduction,
        needs_gradient: bool,
    ) -> Tensor:  # fmt: skip
        rows, columns = logits.shape
        loss = logits.new_empty(rows, dtype=torch.float32)
        lse = logits.new_empty(rows, 2, dtype=torch.float32)
        gradient = logits.new_empty(rows, columns) if needs_gradient and reduction != "none" else None
        early, _ = early_and_late(denominator, logits.dtype)
        fill_rows(logits, target, options, loss, lse, gradient, denominator=early)
        ctx.save_for_backward(logits, target, denominator, lse, gradient)
        ctx.options = options
        ctx.is_used = False
        return reduced(loss, reduction, denominator)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, denominator, lse, gradient = ctx.saved_tensors
        if gradient is None or ctx.is_used:
            gradient = logits.new_empty(logits.shape)
            fill_rows(logits, target, ctx.options, None, lse, gradient, upstream=upstream, denominator=denominator)
        else:
            ctx.is_used = not torch.compiler.is_compiling()
            gradient = scaled(gradient, upstream, early_and_late(denominator, logits.dtype)[1])
        return gradient, *(None,) * 5


def check_labels(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse labels out of range, where they may be looked at."""
    if not may_look_at(target):
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        value = target[bad][0].item()
        raise IndexError(f"{op}: label {value} is out of range: expected 0 to {classes - 1}, or {ignore_index}")


def checked_scaling(op: str, logit_scale: float, softcap: float | None, prefix: str = "") -> Scaling:
    """Both as plain numbers; `prefix` is what their names begin with in the op's signature."""
    scale = constant(op, f"{prefix}logit_scale", logit_scale)
    cap = None if softcap is None else constant(op, f"{prefix}softcap", softcap)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: {prefix}logit_scale must be finite, not {scale}")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"{op}: {prefix}softcap must be positive and finite, or None, not {cap}")
    return Scaling(scale, cap)


def checked_options(
    op: str,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Options:
    """The options of an op's call, as plain numbers."""
    try:
        index = operator.index(ignore_index)
    except TypeError:
        raise TypeError(f"{op}: ignore_index must be an int, not {ignore_index!r}") from None
    scale, cap = checked_scaling(op, logit_scale, softcap)
    smoothing, weight = constant(op, "label_smoothing", label_smoothing), constant(op, "z_loss", z_loss)
    if not -math.inf < weight < math.inf:
        raise ValueError(f"{op}: z_loss must be finite, not {weight}")
    return Options(index, smoothing, weight, cap, scale)


def check_arguments(
    op: str, target: Tensor, like: Tensor, options: Options, reduction: str, denominator: float | Tensor | None
) -> None:
    """Refuse by name what the formulas do not cover; `like` has the dimensions of target and one more."""
    if target.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: target must be int64 or int32, not {target.dtype}")
    if target.dtype == torch.int32 and not -(2**31) <= options.ignore_index < 2**31:
        raise ValueError(f"{op}: ignore_index {options.ignore_index} is beyond the int32 of target")
    if not like.dim():
        raise ValueError(f"{op}: what the target labels has no dimension, expected one more than target")
    if target.shape != like.shape[:-1]:
        raise ValueError(f"{op}: target has shape {tuple(target.shape)}, expected {tuple(like.shape[:-1])}")
    if target.device != like.device:
        raise ValueError(f"{op}: target is on {target.device}, expected {like.device}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if denominator is not None and reduction == "none":
        raise ValueError(f"{op}: a denominator divides a sum, but reduction is 'none'")
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(f"{op}: denominator has shape {tuple(denominator.shape)}, expected one number")
    refuse_learned(op, "denominator", denominator)
    if not 0 <= options.label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, not {options.label_smoothing}")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Cross entropy of `logits` against the class indices `target` (the formulas stand in `liger.ops.loss_rows`).

    Args:
        logits: (..., V), fp32, bf16, fp16 or fp64; rows any stride apart are read without a copy. Never written to.
        target: (...), int64 or int32, on the device of logits.
        ignore_index: the label of rows that have no loss and no gradient.
        label_smoothing: from 0 to 1, as in torch.
        z_loss: weight of lse², 0.0 for none.
        softcap: bound of the tanh on the scaled logits, None for none.
        logit_scale: multiplies the logits before the softcap.
        reduction: "mean" divides by the number of labels that are not ignored; "sum"; "none".
        denominator: divides the sum in place of that number: an int, a float, or a tensor of one element of any dtype
            on any device. If every label is ignored, the loss is 0 then, where "mean" has torch's NaN.

    Returns:
        fp32 (fp64 for fp64 logits): a scalar, or with reduction "none" (...), 0 where the label is ignored.

    Raises:
        IndexError: a label on the CPU is out of range. On a GPU, where the host must not wait to look, the kernel
            prints such a label, and the loss and the gradient of its row are NaN.
        ValueError: target's shape or device, reduction, denominator, softcap, logit_scale or label_smoothing is wrong,
            ignore_index does not fit target's dtype, or an option is a tensor that requires a gradient.
        TypeError: logits are not floating-point, target is not int64 or int32, or ignore_index is no int.
    """
    options = checked_options("cross_entropy", ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    if not logits.is_floating_point():
        raise TypeError(f"cross_entropy: logits must have a floating-point dtype, not {logits.dtype}")
    check_arguments("cross_entropy", target, logits, options, reduction, denominator)
    columns = logits.shape[-1]
    check_labels("cross_entropy", target, columns, ignore_index)

    labels = (target if target.dim() == 1 else target.reshape(-1)).contiguous()
    divide_by = divisor(denominator, reduction, labels, ignore_index, logits)
    if not runs_kernels(logits):
        loss = reference(logits.reshape(-1, columns), labels, options, reduction, divide_by)
    else:
        needs_gradient = torch.is_grad_enabled() and logits.requires_grad
        loss = _CrossEntropy.apply(_rows(logits), labels, divide_by, options, reduction, needs_gradient)
    return loss.view(target.shape) if reduction == "none" else loss
