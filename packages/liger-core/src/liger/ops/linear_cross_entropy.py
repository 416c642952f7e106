r"""Linear layer and cross entropy in one, which does not hold the whole (M, V) logits.

    logits = x Wᵀ + b             loss = Σ_rows loss_row(logits, target) / denominator
    dx = dlogits W                dW = dlogitsᵀ x                db = Σ_rows dlogits

The rows are taken in chunks (see `linear_chunks`): one chunk of logits is turned into its gradient in place (the
formulas and the kernel are those of `loss_rows`) and used up in dx, dW and db before the next one. So the gradients
are there when forward ends, and backward has only the upstream scalar left to multiply, in the gradients' own memory. A
second backward through the same graph computes them again. `reduction="none"` has an upstream gradient per row: forward
keeps two numbers per row, and backward goes through the chunks again. Where all logits are few, they may exist (see
`FEW_LOGITS`).

Losses and softmax run in fp32 (fp64 inputs: all in fp64). dW is summed in the weight's dtype, or in `accum_dtype`, or
in fp32 where that would be rounded too often (see `linear_chunks.updates`); for fp16 weights in fp32, since there it is
not divided by the whole denominator until backward (see `early_and_late`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.ops.cross_entropy import (
    Reduction,
    check_arguments,
    check_labels,
    checked_options,
    cross_entropy,
    divisor,
    reduced,
)
from liger.ops.launch import runs_kernels
from liger.ops.linear_checks import check_accum_dtype, check_dtypes, check_layer
from liger.ops.linear_chunks import (
    empty_gradients,
    given,
    needed,
    through_chunks,
)
from liger.ops.loss_rows import Options, fill_rows
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.upstream_scale import early_and_late, scaled

FEW_LOGITS = 2**24
"""Up to so many, on a GPU, the layer and `cross_entropy` one after the other: the host's time is what counts there, and
the logits and their gradient take a quarter of a chunk's memory in bf16, half of it in fp32."""


def _row_outputs(input: Tensor, lse: Tensor | None, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The loss and lse of every row, not yet filled."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    rows = input.shape[0] if lse is None else 0
    return input.new_empty(rows, dtype=wide), input.new_empty(rows, 2, dtype=wide)


def _run(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, upstream: Tensor | None,
    denominator: Tensor | None, lse: Tensor | None, needs_input: bool, needs_weight: bool, needs_bias: bool,
    compute_dtype: torch.dtype, accum_dtype: torch.dtype, ignore_index: int, label_smoothing: float, z_loss: float,
    softcap: float | None, logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss of every row, lse, dx, dW, db) of (M, H) input; empty what is not needed.

    Where `lse` is given, the first two are not needed. The gradients are multiplied by `upstream` (0-d or (M,)) and
    divided by `denominator` (0-d).
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    needs = (needs_input, needs_weight, needs_bias)
    loss, log_sum = _row_outputs(input, lse, compute_dtype)

    def fill(logits: Tensor, rows: slice) -> None:
        fill_rows(
            logits, target[rows], options, loss[rows] if lse is None else None, (log_sum if lse is None else lse)[rows],
            logits if any(needs) else None,
            upstream=upstream[rows] if upstream is not None and upstream.dim() else upstream, denominator=denominator,
            padded=logits.stride(0),
        )  # fmt: skip

    gradients = through_chunks(input, weight, bias, compute_dtype, accum_dtype, fill, needs, labels=target)
    return loss, log_sum, *gradients


# For torch.compile: dynamo sees one opaque operation, not a loop to unroll. Outside it would only cost host time.
_run_as_op = torch.library.custom_op("liger::linear_cross_entropy", _run, mutates_args=())


@_run_as_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, upstream: Tensor | None,
    denominator: Tensor | None, lse: Tensor | None, needs_input: bool, needs_weight: bool, needs_bias: bool,
    compute_dtype: torch.dtype, accum_dtype: torch.dtype, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = empty_gradients(input, weight, (needs_input, needs_weight, needs_bias), compute_dtype, accum_dtype)
    return *_row_outputs(input, lse, compute_dtype), *gradients


def _runner() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    return _run_as_op if torch.compiler.is_compiling() else _run


@named("linear_cross_entropy")
class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, denominator: Tensor | None,
        reduction: Reduction, needs: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, torch.dtype], options: Options,
    ) -> Tensor:  # fmt: skip
        early, _ = early_and_late(denominator, dtypes[0])
        now = needs if reduction != "none" else (False, False, False)
        loss, lse, dx, dw, db = _runner()(input, weight, bias, target, None, early, None, *now, *dtypes, *options)
        ctx.save_for_backward(input, weight, bias, target, denominator, lse, dx, dw, db)
        ctx.needs, ctx.dtypes, ctx.options = needs, dtypes, options
        ctx.must_run = reduction == "none"
        return reduced(loss, reduction, denominator)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, denominator, lse, *gradients = ctx.saved_tensors
        if ctx.must_run:
            *_, dx, dw, db = _runner()(
                input, weight, bias, target, upstream, denominator, lse, *ctx.needs, *ctx.dtypes, *ctx.options
            )
        else:
            ctx.must_run = not torch.compiler.is_compiling()  # the second time: `scaled` uses these gradients up
            _, late = early_and_late(denominator, ctx.dtypes[0])
            dx, dw, db = (scaled(gradient, upstream, late) for gradient in gradients)
        return *given((dx, dw, db), ctx.needs, weight, bias), *(None,) * 6


def _are_few(logits: int, input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the logits may exist as a whole. In a compiled graph no host waits, and there the op is in one piece."""
    may_be = input.is_cuda and not torch.compiler.is_compiling()  # first: a graph must not depend on how many there are
    return may_be and logits <= FEW_LOGITS and runs_kernels(input, weight, bias)


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(F.linear(input, linear_weight, linear_bias), target, …)` that holds the logits a chunk at a time.

    Only the gradients that are asked for cost time and memory; a frozen weight has none. Under autocast the products
    run in its dtype, as F.linear's would, and the gradients have the dtypes of input and weight. On a GPU up to 2²⁴
    logits exist at once, until backward: they cost less memory than a chunk, and the host less time.

    Args:
        input: (..., H), fp32, bf16, fp16 or fp64.
        linear_weight: (V, H), of input's dtype (any, under autocast) and device.
        target: (...), int64 or int32, on the device of input.
        linear_bias: (V,), as the weight; None for none.
        reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, denominator: as in `cross_entropy`.
        accum_dtype: in which the weight's gradient is summed over the chunks. None: in the weight's own (fp16: fp32),
            or in fp32 where that would be rounded too often (see `liger.ops.linear_chunks`). torch.float32: rounded
            once, at the end; for a bf16 weight that takes three times the gradient's memory.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or with reduction "none" (...), 0 where the label is ignored.

    Raises:
        IndexError: a label on the CPU is out of range; on a GPU its loss is NaN (see `cross_entropy`).
        ValueError: shapes or devices do not fit, an option is wrong as in `cross_entropy`, accum_dtype is neither
            the weight's dtype nor fp32, or the weight holds no data of its own: it is a DTensor, or ZeRO-3 has
            partitioned it. Call this in the forward of the module that owns the weight, where it is whole.
        TypeError: input, weight and bias have different dtypes without autocast, or are not floating-point; target or
            ignore_index is wrong as in `cross_entropy`.
    """
    op = "linear_cross_entropy"
    options = checked_options(op, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_layer(op, input, linear_weight, linear_bias)
    check_arguments(op, target, input, options, reduction, denominator)
    check_labels(op, target, linear_weight.shape[0], ignore_index)
    compute_dtype = check_dtypes(op, input, linear_weight, linear_bias)
    own = torch.float32 if linear_weight.dtype == torch.float16 else linear_weight.dtype
    sum_dtype = check_accum_dtype(op, own, accum_dtype)
    if _are_few(target.numel() * linear_weight.shape[0], input, linear_weight, linear_bias):
        return cross_entropy(
            F.linear(input, linear_weight, linear_bias), target, ignore_index=ignore_index,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
            reduction=reduction, denominator=denominator,
        )  # fmt: skip

    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    divide_by = divisor(denominator, reduction, labels, ignore_index, input)
    loss = _LinearCrossEntropy.apply(
        x, linear_weight, linear_bias, labels, divide_by, reduction, needed(x, linear_weight, linear_bias),
        (compute_dtype, sum_dtype), options,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss
