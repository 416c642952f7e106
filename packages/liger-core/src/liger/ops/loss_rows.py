r"""The rows that cross_entropy and linear_cross_entropy share: from logits and labels to losses and gradients.

For one row x of V logits with label t, s = softcap and ε = label_smoothing:

    z     = s · tanh(logit_scale · x / s)                       z = logit_scale · x without a softcap
    lse   = log Σ_j exp(z_j)
    loss  = (1 − ε) (lse − z_t) + ε/V Σ_j (lse − z_j) + z_loss · lse²
    dz_j  = exp(z_j − lse) (1 + 2 z_loss · lse) − ε/V − (1 − ε) [j = t]
    dx_j  = f · logit_scale · (1 − z_j²/s²) · dz_j              f = upstream gradient / denominator

The smoothing is torch's; the softcap is Gemma 2's (https://arxiv.org/abs/2408.00118); the z-loss is PaLM's
(https://arxiv.org/abs/2204.02311). All of it runs in fp32 (the reference on fp64: in fp64), and dx is rounded once.

lse is kept as two numbers, the row's maximum m and log Σ_j exp(z_j − m): near certainty, z_t − lse and so dz_t have
digits that the sum of the two would have lost.

One kernel reads each row twice: for lse, then, while the row is still in the L2 cache, for dx. Where lse is known, the
first reading is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.ops.launch import jit, launch, next_power_of_2, runs_kernels, sm_count, tl

_SCALE_BLOCK = 4096


class Options(NamedTuple):
    """What the formula of one row depends on, beside the logits and the label."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float


def reference_rows(logits: Tensor, target: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(loss, z) of (M, V) logits in plain, differentiable torch. The loss is 0 where the label is ignored."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    ignored = options.ignore_index
    loss = F.cross_entropy(
        z, target.long(), ignore_index=ignored, label_smoothing=options.label_smoothing, reduction="none"
    )
    if options.z_loss:
        loss = loss + torch.where(target == ignored, 0.0, options.z_loss * z.logsumexp(-1).square())
    return loss, z


def _reference_fill(
    logits: Tensor, target: Tensor, options: Options, loss: Tensor | None, lse: Tensor, gradient: Tensor | None,
    upstream: Tensor | None, denominator: Tensor | None,
) -> None:  # fmt: skip
    """`fill_rows` in plain torch."""
    values, z = reference_rows(logits, target, options)
    if loss is not None:
        loss.copy_(values)
        lse[:, 0] = z.amax(-1)
        lse[:, 1] = (z - lse[:, :1]).logsumexp(-1)
    if gradient is None:
        return
    counts = target != options.ignore_index
    dz = z - lse[:, :1]
    dz.sub_(lse[:, 1:]).exp_()
    dz *= 1 + 2 * options.z_loss * lse.sum(-1, keepdim=True)
    dz -= options.label_smoothing / logits.shape[-1]
    dz[torch.arange(len(dz), device=dz.device), torch.where(counts, target, 0)] -= 1 - options.label_smoothing
    if options.softcap is not None:
        dz *= 1 - (z / options.softcap).square()
    dz *= options.logit_scale
    if upstream is not None:
        dz *= upstream if upstream.dim() == 0 else upstream[:, None]
    if denominator is not None:
        dz /= denominator
    gradient.copy_(torch.where(counts[:, None], dz, 0.0))


@jit(varying=())
def _tanh(x):
    # From exp alone, tanh of a small x would have an absolute error of one rounding of 1; the polynomial is Cephes'.
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)


@jit(varying=())
def _capped(x, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z = x.to(tl.float32) * logit_scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@jit(varying=("target", "upstream", "denominator", "loss", "lse", "upstream_stride", "ignore_index"))
def _rows_kernel(
    logits, target, upstream, denominator, loss, lse, gradient, logits_stride, upstream_stride, columns,
    ignore_index, label_smoothing, z_loss, softcap, logit_scale, HAS_SMOOTHING: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_UPSTREAM: tl.constexpr, HAS_DENOMINATOR: tl.constexpr,
    LSE_IS_KNOWN: tl.constexpr, WRITES_GRADIENT: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # `gradient` may be `logits`: a program owns its row, and reads each tile before it writes it.
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    gradient += row * columns
    at = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    label = tl.load(target + row)

    if label == ignore_index:
        if not LSE_IS_KNOWN:
            tl.store(loss + row, 0.0)
            tl.store(lse + 2 * row, 0.0)
            tl.store(lse + 2 * row + 1, 0.0)
        if WRITES_GRADIENT:
            zeros = tl.zeros((DEPTH, WIDTH), dtype=gradient.dtype.element_ty)
            for first in range(0, columns, DEPTH * WIDTH):
                tl.store(gradient + first + at, zeros, mask=first + at < columns)
        return

    is_label = (label >= 0) & (label < columns)
    if not is_label:
        tl.device_print("liger: label out of range, its loss is NaN: ", label)

    if LSE_IS_KNOWN:
        top = tl.load(lse + 2 * row)
        above = tl.load(lse + 2 * row + 1)
    else:
        z_label = tl.load(logits + label, mask=is_label, other=0.0)
        z_label = _capped(z_label, logit_scale, softcap, HAS_SOFTCAP)
        # Each of WIDTH lanes keeps its own maximum and sum, over DEPTH elements that one thread holds: no exchange
        # between threads until the row is read. The first maximum is finite, so that a lane of -inf stays 0, not NaN.
        peak = tl.full((WIDTH,), -3.4028234663852886e38, dtype=tl.float32)
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        z_sum = tl.zeros((WIDTH,), dtype=tl.float32)
        for first in range(0, columns, DEPTH * WIDTH):
            inside = first + at < columns
            x = tl.load(logits + first + at, mask=inside, other=0.0, eviction_policy="evict_last")
            z = _capped(x, logit_scale, softcap, HAS_SOFTCAP)
            if HAS_SMOOTHING:
                z_sum += tl.sum(tl.where(inside, z, 0.0), axis=0)
            z = tl.where(inside, z, float("-inf"))
            higher = tl.maximum(peak, tl.max(z, axis=0))
            total = total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), axis=0)
            peak = higher
        top = tl.max(peak, axis=0)
        above = tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
        value = top - z_label + above
        if HAS_SMOOTHING:
            value = (1.0 - label_smoothing) * value + label_smoothing * (top - tl.sum(z_sum, axis=0) / columns + above)
        value += z_loss * (top + above) * (top + above)
        tl.store(loss + row, tl.where(is_label, value, float("nan")))
        tl.store(lse + 2 * row, top)
        tl.store(lse + 2 * row + 1, above)

    if WRITES_GRADIENT:
        factor = tl.where(is_label, logit_scale, float("nan"))
        if HAS_UPSTREAM:
            factor *= tl.load(upstream + row * upstream_stride).to(tl.float32)
        if HAS_DENOMINATOR:
            factor /= tl.load(denominator).to(tl.float32)
        gain = 1.0 + 2.0 * z_loss * (top + above)
        for first in range(0, columns, DEPTH * WIDTH):
            column = first + at
            inside = column < columns
            x = tl.load(logits + column, mask=inside, other=0.0, eviction_policy="evict_first")
            z = _capped(x, logit_scale, softcap, HAS_SOFTCAP)
            dz = tl.exp(z - top - above) * gain
            if HAS_SMOOTHING:
                dz -= label_smoothing / columns
            dz = tl.where(column == label, dz - (1.0 - label_smoothing), dz)
            if HAS_SOFTCAP:
                t = z / softcap
                dz *= 1.0 - t * t
            dx = (dz * factor).to(gradient.dtype.element_ty)
            tl.store(gradient + column, dx, mask=inside, eviction_policy="evict_first")


@jit(varying=("upstream", "denominator", "rows"))
def _scale_kernel(buffer, upstream, denominator, rows, columns, HAS_DENOMINATOR: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(upstream).to(tl.float32)
    if HAS_DENOMINATOR:
        factor /= tl.load(denominator).to(tl.float32)
    if factor != 1.0:
        size = rows.to(tl.int64) * columns
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(buffer + at, mask=at < size)
            tl.store(buffer + at, (x.to(tl.float32) * factor).to(buffer.dtype.element_ty), mask=at < size)


def _tile(columns: int) -> tuple[int, int, int]:
    """(depth, width, warps) of a tile: 8 neighbouring columns a thread, `depth` times over.

    Many warps for long rows: few rows are then in flight at once, and the second reading finds them in the L2 cache.
    """
    width = min(max(next_power_of_2(columns), 128), 8192 if columns > 65536 else 4096)
    depth = 2 if columns > width else 1
    return depth, width, max(width // 256, 1)


def fill_rows(
    logits: Tensor, target: Tensor, options: Options, loss: Tensor | None, lse: Tensor, gradient: Tensor | None = None,
    *, upstream: Tensor | None = None, denominator: Tensor | None = None,
) -> None:  # fmt: skip
    """Write `loss` and `lse`, or read `lse` where `loss` is None; write `gradient` if there is one.

    logits: (M, V), rows any stride apart. gradient: (M, V), contiguous; it may be `logits` itself. target, loss: (M,).
    lse: (M, 2), contiguous. `upstream` (0-d or (M,)) multiplies the gradient and `denominator` (0-d) divides it; the
    loss is neither.
    """
    rows, columns = logits.shape
    if not rows:
        return
    if not runs_kernels(logits):
        _reference_fill(logits, target, options, loss, lse, gradient, upstream, denominator)
        return
    depth, width, warps = _tile(columns)
    launch(
        _rows_kernel, (rows,), logits, target, upstream, denominator, loss, lse,
        logits if gradient is None else gradient, logits.stride(0),
        upstream.stride(0) if upstream is not None and upstream.dim() else 0, columns, options.ignore_index,
        options.label_smoothing, options.z_loss, options.softcap or 1.0, options.logit_scale,
        HAS_SMOOTHING=options.label_smoothing != 0, HAS_SOFTCAP=options.softcap is not None,
        HAS_UPSTREAM=upstream is not None, HAS_DENOMINATOR=denominator is not None, LSE_IS_KNOWN=loss is None,
        WRITES_GRADIENT=gradient is not None, DEPTH=depth, WIDTH=width, num_warps=warps,
    )  # fmt: skip


def scaled(buffer: Tensor, upstream: Tensor, denominator: Tensor | None) -> Tensor:
    """`buffer` · upstream / denominator: in the buffer itself, which costs nothing where the factor is exactly 1.

    Out of place in the reference, and under torch.compile, which fuses it and must not see a saved tensor change.
    """
    if torch.compiler.is_compiling() or not runs_kernels(buffer):
        factor = upstream if denominator is None else upstream / denominator
        return (buffer.to(torch.promote_types(buffer.dtype, torch.float32)) * factor).to(buffer.dtype)
    if buffer.numel():
        columns = buffer.shape[-1]
        programs = min(-(-buffer.numel() // _SCALE_BLOCK), 16 * sm_count(buffer))
        launch(
            _scale_kernel, (programs,), buffer, upstream, denominator, buffer.numel() // columns, columns,
            HAS_DENOMINATOR=denominator is not None, BLOCK=_SCALE_BLOCK, num_warps=8,
        )  # fmt: skip
    return buffer


def early_and_late(denominator: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What a gradient of this dtype is divided by in forward, and what in backward.

    In fp16 the quotient would underflow before a GradScaler's factor arrives with the upstream gradient. There only the
    denominator's mantissa is divided by in forward; its power of two rounds nothing in backward, nor does the scaler's.
    """
    if denominator is None or dtype != torch.float16:
        return denominator, None
    mantissa, exponent = torch.frexp(denominator.float())
    return mantissa, torch.ldexp(torch.ones_like(mantissa), exponent)
