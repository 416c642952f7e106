r"""Linear layer and cross entropy in one, which never holds the whole (M, V) logits.

    logits = x Wᵀ + b             loss = Σ_rows loss_row(logits, target) / denominator
    dx = dlogits W                dW = dlogitsᵀ x                db = Σ_rows dlogits

The rows are taken in chunks: one chunk of logits is computed into a buffer, turned into its gradient in place (the
formulas and the kernel are those of `loss_rows`), and used up in dx, dW and db before the next one. So the gradients
are there when forward ends, and backward has only the upstream scalar left to multiply, in the gradients' own memory. A
second backward through the same graph computes them again. `reduction="none"` has an upstream gradient per row: forward
keeps two numbers per row, and backward goes through the chunks again.

The products are matmuls of the inputs' dtype, which sum in fp32. Losses, softmax and db run in fp32 (fp64 inputs:
all in fp64). dW is summed over the chunks in the weight's dtype, rounded once a chunk, or in `accum_dtype`; for fp16
weights in fp32, since there it is not divided by the whole denominator until backward (see `early_and_late`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from liger.ops.cross_entropy import Reduction, check_arguments, check_labels, divisor, reduced
from liger.ops.loss_rows import Options, fill_rows
from liger.ops.upstream_scale import early_and_late, scaled

CHUNK_BYTES = 256 * 2**20
"""How much memory one chunk of logits may take: 1024 rows of 128256 in bf16."""

CPU_CHUNK_BYTES = 8 * 2**20
"""The same on a CPU, where the reference makes several tensors of a chunk's size."""

_TILE = 128  # rows that the matmuls work on at once
_ROWS_PER_UPDATE = 1280  # rows whose product with x takes longer than reading and writing dW
_UPDATES = 8  # rounding dW this often leaves its error within the error rule


def chunks(
    rows: int, columns: int, itemsize: int, weight_gradient_bytes: int = 0, chunk_bytes: int | None = None
) -> list[tuple[int, int]]:
    """(start, stop) of every chunk of rows, all of a size within one tile of 128 rows.

    A chunk takes at most `chunk_bytes` (CHUNK_BYTES). Where dW is computed, every chunk reads, adds to and rounds all
    of dW: there it may take as much memory as dW does, if it needs that for 1280 rows, or for 8 chunks in all.
    """
    most = (chunk_bytes or CHUNK_BYTES) // (columns * itemsize)
    if weight_gradient_bytes:
        wanted = max(_ROWS_PER_UPDATE, -(-rows // _UPDATES))
        most = max(most, min(wanted, weight_gradient_bytes // (columns * itemsize)))
    tile = _TILE if most >= _TILE else 1
    tiles = -(-rows // tile)
    count = -(-tiles // max(most // tile, 1))
    edges = [min(i * tiles // count * tile, rows) for i in range(count + 1)] if count else []
    return list(itertools.pairwise(edges))


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """`total` += a b, or = a b for the first; rounded once, to the dtype of `total`."""
    beta = 0 if first else 1  # with 0, what is in `total` is not read
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(a @ b)
    else:
        total.add_(a @ b)


def _outputs(
    input: Tensor, weight: Tensor, lse: Tensor | None, needs_input: bool, needs_weight: bool, needs_bias: bool,
    compute_dtype: torch.dtype, accum_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """What `_run` returns, not yet filled."""
    wide = torch.promote_types(compute_dtype, torch.float32)
    rows = input.shape[0] if lse is None else 0
    return (
        input.new_empty(rows, dtype=wide),
        input.new_empty(rows, 2, dtype=wide),
        input.new_empty(input.shape if needs_input else (0,)),
        input.new_empty(weight.shape if needs_weight else (0,), dtype=accum_dtype),
        input.new_empty(weight.shape[0] if needs_bias else 0, dtype=wide),
    )


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
    loss, log_sum, dx, dw, db = _outputs(input, weight, lse, *needs, compute_dtype, accum_dtype)
    rows, columns = input.shape[0], weight.shape[0]
    if not rows:
        dw.zero_()
        db.zero_()
    budget = min(CPU_CHUNK_BYTES, CHUNK_BYTES) if input.device.type == "cpu" else None
    parts = chunks(rows, columns, compute_dtype.itemsize, dw.numel() * dw.element_size(), budget)
    buffer = input.new_empty((max((stop - start for start, stop in parts), default=0), columns), dtype=compute_dtype)

    w = weight.to(compute_dtype)
    b = None if bias is None else bias.to(compute_dtype)
    for start, stop in parts:
        x = input[start:stop].to(compute_dtype)
        logits = buffer[: stop - start]
        if b is None:
            torch.mm(x, w.t(), out=logits)
        else:
            torch.addmm(b, x, w.t(), out=logits)
        fill_rows(
            logits, target[start:stop], options, loss[start:stop] if lse is None else None,
            (log_sum if lse is None else lse)[start:stop], logits if any(needs) else None,
            upstream=upstream[start:stop] if upstream is not None and upstream.dim() else upstream,
            denominator=denominator,
        )  # fmt: skip
        if needs_input and dx.dtype == compute_dtype:
            torch.mm(logits, w, out=dx[start:stop])
        elif needs_input:
            dx[start:stop] = logits @ w
        if needs_weight:
            _add_product(dw, logits.t(), x, first=start == 0)
        if needs_bias and start == 0:
            torch.sum(logits, 0, dtype=db.dtype, out=db)
        elif needs_bias:
            db += logits.sum(0, dtype=db.dtype)
    return loss, log_sum, dx, dw, db


# For torch.compile: dynamo sees one opaque operation, not a loop to unroll. Outside it would only cost host time.
_run_as_op = torch.library.custom_op("liger::linear_cross_entropy", _run, mutates_args=())


@_run_as_op.register_fake
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, upstream: Tensor | None,
    denominator: Tensor | None, lse: Tensor | None, *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(input, weight, lse, *args[:5])


def _runner() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    return _run_as_op if torch.compiler.is_compiling() else _run


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
        needs_input, needs_weight, needs_bias = ctx.needs
        return (
            dx if needs_input else None,
            dw.to(weight.dtype) if needs_weight else None,
            db.to(bias.dtype) if needs_bias else None,
            *(None,) * 6,
        )


def _check_layer(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if hasattr(weight, "device_mesh"):
        raise ValueError(f"{op}: linear_weight is a DTensor: pass the whole weight, as its module's forward sees it")
    if weight.numel() == 0:
        raise ValueError(f"{op}: linear_weight is empty, shape {tuple(weight.shape)}: has ZeRO-3 partitioned it?")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        expected = f"(V, {input.shape[-1]})"
        raise ValueError(f"{op}: linear_weight has shape {tuple(weight.shape)}, expected {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: linear_bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected input's device {input.device}")


def _compute_dtype(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype that `F.linear` would compute in: autocast's, where it is on, else the one that all of them have."""
    device = input.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def cast(dtype: torch.dtype) -> torch.dtype:
        return dtype if autocast is None or dtype == torch.float64 else autocast

    for name, tensor in (("input", input), ("linear_weight", weight), ("linear_bias", bias)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating-point dtype, not {tensor.dtype}")
        if cast(tensor.dtype) != cast(input.dtype):
            raise TypeError(f"{op}: input is {input.dtype} and {name} is {tensor.dtype}: they must agree")
    return cast(input.dtype)


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
    """`cross_entropy(F.linear(input, linear_weight, linear_bias), target, …)` that never holds the logits.

    Only the gradients that are asked for cost time and memory; a frozen weight has none. Under autocast the products
    run in its dtype, as F.linear's would, and the gradients have the dtypes of input and weight.

    Args:
        input: (..., H), fp32, bf16, fp16 or fp64.
        linear_weight: (V, H), of input's dtype (any, under autocast) and device.
        target: (...), int64 or int32, on the device of input.
        linear_bias: (V,), as the weight; None for none.
        reduction, ignore_index, label_smoothing, z_loss, softcap, logit_scale, denominator: as in `cross_entropy`.
        accum_dtype: in which the weight's gradient is summed over the chunks. None: in the weight's own (fp16: fp32).
            torch.float32: rounded once, at the end; for a bf16 weight that takes three times the gradient's memory.

    Returns:
        fp32 (fp64 for fp64 inputs): a scalar, or with reduction "none" (...), 0 where the label is ignored.

    Raises:
        IndexError: a label on the CPU is out of range; on a GPU its loss is NaN (see `cross_entropy`).
        ValueError: shapes or devices do not fit, or the weight holds no data of its own: it is a DTensor, or ZeRO-3
            has partitioned it. Call this in the forward of the module that owns the weight, where it is whole.
        TypeError: input, weight and bias have different dtypes without autocast, or are not floating-point.
    """
    op = "linear_cross_entropy"
    cap = None if softcap is None else float(softcap)
    options = Options(ignore_index, float(label_smoothing), float(z_loss), cap, float(logit_scale))
    _check_layer(op, input, linear_weight, linear_bias)
    check_arguments(op, target, input, options, reduction, denominator)
    check_labels(op, target, linear_weight.shape[0], ignore_index)
    compute_dtype = _compute_dtype(op, input, linear_weight, linear_bias)
    own = torch.float32 if linear_weight.dtype == torch.float16 else linear_weight.dtype
    if accum_dtype not in (None, own, torch.promote_types(own, torch.float32)):
        raise ValueError(f"{op}: accum_dtype must be None, {own} or torch.float32, not {accum_dtype}")

    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    divide_by = divisor(denominator, reduction, labels, ignore_index, input)
    needs = tuple(t is not None and t.requires_grad for t in (x, linear_weight, linear_bias))
    loss = _LinearCrossEntropy.apply(
        x, linear_weight, linear_bias, labels, divide_by, reduction, needs if torch.is_grad_enabled() else (False,) * 3,
        (compute_dtype, accum_dtype or own), options,
    )  # fmt: skip
    return loss.view(target.shape) if reduction == "none" else loss
