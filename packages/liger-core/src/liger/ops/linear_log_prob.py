r"""Linear layer and log-softmax in one: every token's log-probability and entropy, never the whole (M, V) logits.

    z = cap(logit_scale · (x Wᵀ + b)) / temperature            p = softmax(z)
    log_prob = log p_target                                    entropy = − Σ_j p_j log p_j

Forward takes the rows in chunks (see `linear_chunks`) and keeps four numbers of each. With them, backward needs no
whole rows: it computes the logits of a slice of classes again, turns them into their gradient in place (the formulas
and the kernels are those of `log_prob_rows`), and uses them up in dx, dW and db before the next slice (see
`linear_slices`). So both have an upstream gradient for every token, and a second backward through the same graph is as
the first.

Log-probabilities, entropies and softmax run in fp32 (fp64 inputs: all in fp64).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from liger.ops.constant import constant
from liger.ops.cross_entropy import check_arguments, check_labels, checked_options
from liger.ops.linear_checks import check_dtypes, check_layer
from liger.ops.linear_chunks import (
    Gradients,
    empty_gradients,
    given,
    needed,
    through_chunks,
)
from liger.ops.linear_slices import through_slices
from liger.ops.log_prob_rows import differentiate_rows, measure_rows
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.scaling import Scaling


class LogProb(NamedTuple):
    """What `linear_log_prob` returns: three tensors of the target's shape."""

    log_prob: Tensor
    """log p of the target, fp32 (fp64 for fp64 inputs), at most 0."""
    entropy: Tensor
    """The entropy of p in nats, of the same dtype."""
    is_top1: Tensor
    """bool: whether the target is the argmax; of several largest, the first."""


def _forward_outputs(input: Tensor, compute_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `_run_forward` returns, not yet filled."""
    rows, wide = input.shape[0], torch.promote_types(compute_dtype, torch.float32)
    return (
        input.new_empty(rows, dtype=wide),
        input.new_empty(rows, dtype=wide),
        input.new_empty(rows, dtype=torch.bool),
        input.new_empty(rows, 4, dtype=wide),
    )


def _run_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, compute_dtype: torch.dtype, temperature: float,
    ignore_index: int, logit_scale: float, softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(log_prob, entropy, is_top1, statistics of every row) of (M, H) input."""
    scaling = Scaling(logit_scale, softcap)
    outputs = _forward_outputs(input, compute_dtype)

    def fill(logits: Tensor, rows: slice) -> None:
        log_prob, entropy, is_top1, statistics = (t[rows] for t in outputs)
        measure_rows(logits, target[rows], ignore_index, scaling, temperature, log_prob, entropy, is_top1, statistics)

    no = (False, False, False)
    through_chunks(input, weight, bias, compute_dtype, weight.dtype, fill, no)
    return outputs


def _run_backward(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, statistics: Tensor,
    log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, needs_input: bool, needs_weight: bool,
    needs_bias: bool, compute_dtype: torch.dtype, temperature: float, ignore_index: int, logit_scale: float,
    softcap: float | None,
) -> Gradients:  # fmt: skip
    """(dx, dW, db) of (M, H) input; empty what is not needed. An upstream gradient that is None costs nothing."""
    scaling = Scaling(logit_scale, softcap)

    def fill(logits: Tensor, rows: slice, first_class: int) -> None:
        log_prob, entropy = (None if g is None else g[rows] for g in (log_prob_gradient, entropy_gradient))
        differentiate_rows(
            logits, target[rows], ignore_index, scaling, temperature, statistics[rows], log_prob, entropy,
            first_class, weight.shape[0],
        )  # fmt: skip

    return through_slices(input, weight, bias, compute_dtype, fill, (needs_input, needs_weight, needs_bias))


# For torch.compile: dynamo sees two opaque operations, not loops to unroll. Outside they would only cost host time.
_forward_as_op = torch.library.custom_op("liger::linear_log_prob", _run_forward, mutates_args=())
_backward_as_op = torch.library.custom_op("liger::linear_log_prob_backward", _run_backward, mutates_args=())


@_forward_as_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, compute_dtype: torch.dtype, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _forward_outputs(input, compute_dtype)


@_backward_as_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, statistics: Tensor,
    log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, needs_input: bool, needs_weight: bool,
    needs_bias: bool, compute_dtype: torch.dtype, *args: Any,
) -> Gradients:  # fmt: skip
    return empty_gradients(input, weight, (needs_input, needs_weight, needs_bias), compute_dtype, weight.dtype)


@named("linear_log_prob")
class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor,
        needs: tuple[bool, bool, bool], compute_dtype: torch.dtype, temperature: float, ignore_index: int,
        scaling: Scaling,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        run = _forward_as_op if torch.compiler.is_compiling() else _run_forward
        options = (compute_dtype, temperature, ignore_index, *scaling)
        log_prob, entropy, is_top1, statistics = run(input, weight, bias, target, *options)
        ctx.save_for_backward(input, weight, bias, target, statistics)
        ctx.needs, ctx.options = needs, options
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        return log_prob, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, statistics = ctx.saved_tensors
        run: Callable[..., Gradients] = _backward_as_op if torch.compiler.is_compiling() else _run_backward
        gradients = run(
            input, weight, bias, target, statistics, log_prob_gradient, entropy_gradient, *ctx.needs, *ctx.options
        )
        return *given(gradients, ctx.needs, weight, bias), *(None,) * 6


def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> LogProb:
    """Log-probability of each target, entropy and whether it is the argmax, without ever holding the logits.

    Differentiable in log_prob and in entropy, each with any gradient for every token; only the gradients that are asked
    for cost time and memory, and the entropy's costs nothing where only log_prob's is used. Under autocast the products
    run in its dtype, as F.linear's would, and the gradients have the dtypes of input and weight.

    Args:
        input: (..., H), fp32, bf16, fp16 or fp64.
        linear_weight: (V, H), of input's dtype (any, under autocast) and device.
        target: (...), int64 or int32, on the device of input.
        linear_bias: (V,), as the weight; None for none.
        temperature: divides the logits, after scale and softcap.
        softcap: bound of the tanh on the scaled logits, None for none.
        logit_scale: multiplies the logits before the softcap.
        ignore_index: the target of tokens whose log_prob and entropy are 0, is_top1 False, and that have no gradient.

    Returns:
        (log_prob, entropy, is_top1), each (...); the first two fp32 (fp64 for fp64 inputs), is_top1 bool.

    Raises:
        IndexError: a target on the CPU is out of range; on a GPU its log_prob is NaN, and so is the gradient.
        ValueError: temperature, softcap or logit_scale is out of range, shapes or devices do not fit, or the weight
            holds no data of its own: it is a DTensor, or ZeRO-3 has partitioned it. Call this in the forward of the
            module that owns the weight, where it is whole.
        TypeError: input, weight and bias have different dtypes without autocast, or are not floating-point; target is
            not int64 or int32, or ignore_index is no int.

    Example:
        >>> hidden, weight = torch.randn(2, 5, 16, requires_grad=True), torch.randn(100, 16)
        >>> log_prob, entropy, is_top1 = linear_log_prob(hidden, weight, torch.randint(100, (2, 5)), temperature=0.7)
        >>> (log_prob.mean() + 0.01 * entropy.mean()).backward()
    """
    op = "linear_log_prob"
    options = checked_options(op, ignore_index, softcap=softcap, logit_scale=logit_scale)
    check_layer(op, input, linear_weight, linear_bias)
    check_arguments(op, target, input, options, "none", None)
    temperature = constant(op, "temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, not {temperature}")
    check_labels(op, target, linear_weight.shape[0], ignore_index)
    compute_dtype = check_dtypes(op, input, linear_weight, linear_bias)

    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    outputs = _LinearLogProb.apply(
        x, linear_weight, linear_bias, labels, needed(x, linear_weight, linear_bias), compute_dtype,
        temperature, options.ignore_index, options.scaling,
    )  # fmt: skip
    return LogProb(*(t.view(target.shape) for t in outputs))
