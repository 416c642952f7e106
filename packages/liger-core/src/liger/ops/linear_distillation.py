r"""Two linear layers and the divergence of their softmaxes in one, which never holds the whole (M, V) logits of either.

    x = student_input · student_weightᵀ + student_bias          y = teacher_input · teacher_weightᵀ + teacher_bias
    loss = Σ_rows loss_row(x, y) / denominator
    dstudent_input = dx student_weight          dstudent_weight = dxᵀ student_input          dstudent_bias = Σ_rows dx

The rows are taken in chunks (see `linear_chunks`): a chunk of the student's logits is turned into its gradient in place
(the formulas and the kernel are those of `distillation_rows`), beside the teacher's, and used up before the next one.
So the gradients are there when forward ends, and backward has only the upstream scalar left to multiply, in the
gradients' own memory. A second backward through the same graph computes them again. `reduction="none"` has an upstream
gradient per row, so that backward goes through the chunks again, with both products.

The teacher is a constant: no gradient reaches its input, weight or bias.

Losses and softmaxes run in fp32 (fp64 inputs: all in fp64). The student's weight gradient is summed in the weight's
dtype (fp16: fp32), in `accum_dtype`, or in fp32 where that would be rounded too often (see `linear_chunks.updates`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from liger.ops.constant import constant
from liger.ops.cross_entropy import (
    Reduction,
    check_arguments,
    checked_options,
    checked_scaling,
    divisor,
    reduced,
)
from liger.ops.distillation_rows import fill_distillation_rows
from liger.ops.linear_checks import check_accum_dtype, check_dtypes, check_layer
from liger.ops.linear_chunks import (
    empty_gradients,
    empty_logits,
    given,
    needed,
    project,
    through_chunks,
)
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.scaling import Scaling
from liger.ops.upstream_scale import early_and_late, scaled

_STUDENT = ("student_input", "student_weight", "student_bias")
_TEACHER = ("teacher_input", "teacher_weight", "teacher_bias")


def _empty_loss(input: Tensor, compute_dtype: torch.dtype) -> Tensor:
    """The loss of every row, not yet filled."""
    return input.new_empty(input.shape[0], dtype=torch.promote_types(compute_dtype, torch.float32))


def _run(
    input: Tensor, weight: Tensor, bias: Tensor | None, teacher_input: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, counts: Tensor, labels: Tensor | None, upstream: Tensor | None,
    denominator: Tensor | None, needs_input: bool, needs_weight: bool, needs_bias: bool, compute_dtype: torch.dtype,
    accum_dtype: torch.dtype, teacher_dtype: torch.dtype, beta: float, temperature: float, student_logit_scale: float,
    student_softcap: float | None, teacher_logit_scale: float, teacher_softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss of every row, dx, dW, db) of the student's (M, H) input; empty what is not needed.

    The gradients are multiplied by `upstream` (0-d or (M,)) and divided by `denominator` (0-d).
    """
    needs = (needs_input, needs_weight, needs_bias)
    loss = _empty_loss(input, compute_dtype)
    w = teacher_weight.to(teacher_dtype)
    b = None if teacher_bias is None else teacher_bias.to(teacher_dtype)
    scalings = Scaling(student_logit_scale, student_softcap), Scaling(teacher_logit_scale, teacher_softcap)

    def fill(logits: Tensor, rows: slice) -> None:
        teacher_logits = empty_logits(teacher_input, logits.shape[0], logits.shape[1], teacher_dtype)
        project(teacher_input[rows].to(teacher_dtype), w, b, teacher_logits)
        fill_distillation_rows(
            logits, teacher_logits, counts[rows], beta, temperature, scalings, loss[rows], with_gradient=any(needs),
            upstream=upstream[rows] if upstream is not None and upstream.dim() else upstream, denominator=denominator,
        )  # fmt: skip

    return loss, *through_chunks(input, weight, bias, compute_dtype, accum_dtype, fill, needs, labels=labels, buffers=2)


# For torch.compile: dynamo sees one opaque operation, not a loop to unroll. Outside it would only cost host time.
_run_as_op = torch.library.custom_op("liger::linear_distillation", _run, mutates_args=())


@_run_as_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, teacher_input: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, counts: Tensor, labels: Tensor | None, upstream: Tensor | None,
    denominator: Tensor | None, needs_input: bool, needs_weight: bool, needs_bias: bool, compute_dtype: torch.dtype,
    accum_dtype: torch.dtype, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = empty_gradients(input, weight, (needs_input, needs_weight, needs_bias), compute_dtype, accum_dtype)
    return _empty_loss(input, compute_dtype), *gradients


def _runner() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    return _run_as_op if torch.compiler.is_compiling() else _run


@named("linear_distillation")
class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, teacher_input: Tensor, teacher_weight: Tensor,
        teacher_bias: Tensor | None, counts: Tensor, labels: Tensor | None, denominator: Tensor | None,
        reduction: Reduction, needs: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
        beta: float, temperature: float, scalings: tuple[Scaling, Scaling],
    ) -> Tensor:  # fmt: skip
        tensors = (input, weight, bias, teacher_input, teacher_weight, teacher_bias, counts, labels)
        early, _ = early_and_late(denominator, dtypes[0])
        now = needs if reduction != "none" else (False, False, False)
        options = (beta, temperature, *scalings[0], *scalings[1])
        loss, dx, dw, db = _runner()(*tensors, None, early, *now, *dtypes, *options)
        ctx.save_for_backward(*tensors, denominator, dx, dw, db)
        ctx.needs, ctx.dtypes, ctx.options = needs, dtypes, options
        ctx.must_run = reduction == "none"
        return reduced(loss, reduction, denominator)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, denominator, dx, dw, db = ctx.saved_tensors
        if ctx.must_run:
            _, dx, dw, db = _runner()(*tensors, upstream, denominator, *ctx.needs, *ctx.dtypes, *ctx.options)
        else:
            ctx.must_run = not torch.compiler.is_compiling()  # the second time: `scaled` uses these gradients up
            _, late = early_and_late(denominator, ctx.dtypes[0])
            dx, dw, db = (scaled(gradient, upstream, late) for gradient in (dx, dw, db))
        return *given((dx, dw, db), ctx.needs, *tensors[1:3]), *(None,) * 12


def _check_pair(op: str, student: Tensor, teacher: Tensor, student_weight: Tensor, teacher_weight: Tensor) -> None:
    """Refuse a teacher that has not the student's rows, classes and device."""
    if teacher.shape[:-1] != student.shape[:-1]:
        expected = f"({', '.join(map(str, student.shape[:-1]))}, H)"
        raise ValueError(f"{op}: teacher_input has shape {tuple(teacher.shape)}, expected {expected}, as student_input")
    if teacher_weight.shape[0] != student_weight.shape[0]:
        raise ValueError(
            f"{op}: teacher_weight has {teacher_weight.shape[0]} rows and student_weight {student_weight.shape[0]}: "
            "they must have one vocabulary"
        )
    if teacher.device != student.device:
        raise ValueError(
            f"{op}: teacher_input is on {teacher.device}, expected student_input's device {student.device}"
        )


def linear_distillation(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    target: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence of a student from its teacher (GKD), without the logits of either.

    The formulas stand in `liger.ops.distillation_rows`; beta means what it means in TRL's GKD. The teacher is a
    constant: nothing of it gets a gradient. Only the student's gradients that are asked for cost time and memory. Under
    autocast the products run in its dtype, as F.linear's would.

    Args:
        student_input: (..., H), fp32, bf16, fp16 or fp64.
        student_weight: (V, H), of student_input's dtype (any, under autocast) and device.
        teacher_input: (..., H'), of any dtype and hidden size, as many rows as student_input, on its device.
        teacher_weight: (V, H'), of teacher_input's dtype (any, under autocast).
        target: (...), int64 or int32: where it is ignore_index, the row counts for nothing. Its other values only tell
            which classes are frequent: those rows of the weight's gradient are summed in fp32. None: every row counts,
            and the first of them tell.
        student_bias, teacher_bias: (V,), as the weights; None for none.
        beta: 0 is the forward divergence KL(teacher ‖ student), 1 the reverse one, KL(student ‖ teacher).
        temperature: divides the logits of both, after scale and softcap. The loss is not multiplied by its square.
        student_softcap, teacher_softcap: bounds of the tanh on the scaled logits, None for none.
        student_logit_scale, teacher_logit_scale: multiply the logits before the softcap.
        ignore_index: the target of rows that have no loss and no gradient.
        reduction: "mean" divides by the number of rows that count; "sum"; "none".
        denominator: divides the sum in place of that number, as in `cross_entropy`. If no row counts, the loss is 0
            then, where "mean" has torch's NaN.
        accum_dtype: in which the weight's gradient is summed, as in `linear_cross_entropy`.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or with reduction "none" (...), 0 where the row does not count.

    Raises:
        ValueError: beta, temperature, a scale or a softcap is out of range, reduction, denominator or accum_dtype is
            wrong, shapes or devices do not fit, or a weight holds no data of its own: it is a DTensor, or ZeRO-3 has
            partitioned it.
        TypeError: input, weight and bias of one side have different dtypes without autocast, or are not
            floating-point; target is not int64 or int32, or ignore_index is no int.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
        >>> teacher_hidden, teacher_weight = torch.randn(2, 5, 32), torch.randn(100, 32)
        >>> linear_distillation(hidden, weight, teacher_hidden, teacher_weight, beta=0.1, temperature=0.9).backward()
    """
    op = "linear_distillation"
    check_layer(op, student_input, student_weight, student_bias, _STUDENT)
    check_layer(op, teacher_input, teacher_weight, teacher_bias, _TEACHER)
    _check_pair(op, student_input, teacher_input, student_weight, teacher_weight)
    beta, temperature = constant(op, "beta", beta), constant(op, "temperature", temperature)
    if not 0 <= beta <= 1:
        raise ValueError(f"{op}: beta must be from 0 to 1, not {beta}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, not {temperature}")
    shape, frequent = student_input.shape[:-1], None if target is None else target.reshape(-1)
    if target is None:
        target = student_input.new_full(shape, 0 if ignore_index else 1, dtype=torch.int64)
    check_arguments(op, target, student_input, checked_options(op, ignore_index), reduction, denominator)
    scalings = (
        checked_scaling(op, student_logit_scale, student_softcap, "student_"),
        checked_scaling(op, teacher_logit_scale, teacher_softcap, "teacher_"),
    )
    compute_dtype = check_dtypes(op, student_input, student_weight, student_bias, _STUDENT)
    teacher_dtype = check_dtypes(op, teacher_input, teacher_weight, teacher_bias, _TEACHER)
    own = torch.float32 if student_weight.dtype == torch.float16 else student_weight.dtype
    sum_dtype = check_accum_dtype(op, own, accum_dtype)

    x, y = (t.reshape(-1, t.shape[-1]) for t in (student_input, teacher_input.detach()))
    labels = target.reshape(-1)
    loss = _LinearDistillation.apply(
        x, student_weight, student_bias, y, teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(), labels != ignore_index, frequent,
        divisor(denominator, reduction, labels, ignore_index, x), reduction,
        needed(x, student_weight, student_bias), (compute_dtype, sum_dtype, teacher_dtype),
        beta, temperature, scalings,
    )  # fmt: skip
    return loss.view(shape) if reduction == "none" else loss
