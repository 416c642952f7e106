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

from liger.ops.launch import jit, l2_bytes, launch, next_power_of_2, runs_kernels, tl
from liger.ops.scaling import Scaling, reference_c, reference_z, scaled_z, softcap_c


class Options(NamedTuple):
    """What the formula of one row depends on, beside the logits and the label."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float | None
    logit_scale: float

    @property
    def scaling(self) -> Scaling:
        """From the logits to z."""
        return Scaling(self.logit_scale, self.softcap)


def reference_rows(logits: Tensor, target: Tensor, options: Options) -> Tensor:
    """The loss of every row of (M, V) logits in plain, differentiable torch; 0 where the label is ignored."""
    z, ignored = reference_z(logits, options.scaling), options.ignore_index
    loss = F.cross_entropy(
        z, target.long(), ignore_index=ignored, label_smoothing=options.label_smoothing, reduction="none"
    )
    if options.z_loss:
        loss = loss + torch.where(target == ignored, 0.0, options.z_loss * z.logsumexp(-1).square())
    return loss


def _reference_fill(
    logits: Tensor, target: Tensor, options: Options, loss: Tensor | None, lse: Tensor, gradient: Tensor | None,
    upstream: Tensor | None, denominator: Tensor | None, part: bool,
) -> None:  # fmt: skip
    """`fill_rows` in plain torch, with one temporary of the logits' size: the passes over it are what it costs."""
    z, smoothing = reference_z(logits, options.scaling), options.label_smoothing
    counts = target != options.ignore_index
    here = counts & (target >= 0) & (target < logits.shape[-1]) if part else counts
    label = torch.where(here, target, 0).long()[:, None]
    z_label = z.gather(-1, label)[:, 0]
    if part:
        z_label = torch.where(here, z_label, 0.0)
    if loss is not None:
        lse[:, 0] = z.amax(-1).clamp(min=torch.finfo(z.dtype).min) if part else z.amax(-1)
    top, above = lse.unbind(-1)
    exponential = (z - top[:, None]).exp_()
    if loss is not None:
        above.copy_(exponential.sum(-1).log_())
        value = top - z_label + above
        if smoothing:
            value = (1 - smoothing) * value + smoothing * (top - z.mean(-1) + above)
        if options.z_loss:
            value += options.z_loss * (top + above).square()
        loss.copy_(torch.where(counts, z_label if part else value, 0.0))
    if gradient is None:
        return

    factor = torch.full_like(top, options.logit_scale) if upstream is None else options.logit_scale * upstream
    if denominator is not None:
        factor = factor / denominator
    gain = 1 + 2 * options.z_loss * (top + above)
    dx = exponential.mul_(((-above).exp() * gain * factor)[:, None])
    if smoothing:
        dx -= (smoothing / logits.shape[-1] * factor).expand_as(top)[:, None]
    dz_label = (z_label - top - above).exp() * gain - smoothing / logits.shape[-1] - (1 - smoothing)
    dx_label = (dz_label * factor)[:, None]
    dx.scatter_(-1, label, torch.where(here[:, None], dx_label, dx.gather(-1, label)) if part else dx_label)
    if options.softcap is not None:
        dx *= reference_c(logits, options.scaling)
    gradient.copy_(dx.masked_fill_(~counts[:, None], 0.0))


@jit(varying=())
def _fold(
    logits, column, columns, padded, peak, total, z_sum, logit_scale, softcap, HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take a tile into every lane's maximum, its sum of exponentials relative to it, and its sum."""
    there = column < padded if MASKED else None
    x = tl.load(logits + column, mask=there, other=0.0 if MASKED else None, eviction_policy="evict_last")
    z = scaled_z(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    if HAS_SMOOTHING:
        z_sum += tl.sum(tl.where(column < columns, z, 0.0) if MASKED else z, axis=0)
    if MASKED:
        z = tl.where(column < columns, z, float("-inf"))
    higher = tl.maximum(peak, tl.max(z, axis=0))
    return higher, total * tl.exp(peak - higher) + tl.sum(tl.exp(z - higher[None, :]), axis=0), z_sum


@jit(varying=())
def _differentiate(
    logits, gradient, column, padded, top, slope, uniform, logit_scale, softcap, HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile as if no column of it were the label."""
    there = column < padded if MASKED else None
    x = tl.load(logits + column, mask=there, other=0.0 if MASKED else None, eviction_policy="evict_first")
    z = scaled_z(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    dx = tl.exp(z - top) * slope
    if HAS_SMOOTHING:
        dx -= uniform
    if HAS_SOFTCAP:
        dx *= softcap_c(x, logit_scale, softcap, HAS_SCALE)
    tl.store(gradient + column, dx.to(gradient.dtype.element_ty), mask=there, eviction_policy="evict_first")


@jit(
    varying=("target", "upstream", "denominator", "loss", "lse", "upstream_stride", "ignore_index"),
    registers=64,  # so that 32 warps fit a multiprocessor
)
def _rows_kernel(
    logits, target, upstream, denominator, loss, lse, gradient, logits_stride, gradient_stride, upstream_stride,
    columns, padded, ignore_index, label_smoothing, z_loss, softcap, logit_scale, HAS_SMOOTHING: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_UPSTREAM: tl.constexpr, HAS_DENOMINATOR: tl.constexpr,
    LSE_IS_KNOWN: tl.constexpr, WRITES_GRADIENT: tl.constexpr, IS_PART: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    # `gradient` may be `logits`: a program owns its row, and reads each tile before it writes it. From `columns` up to
    # `padded` there is memory that is nobody's: with it, loads and stores are 16 bytes wide up to the end of the row.
    tile = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = columns // (DEPTH * WIDTH) * (DEPTH * WIDTH)  # up to here no tile needs a mask
    # inductor hands floats over in fp64
    label_smoothing, z_loss = tl.full((), label_smoothing, tl.float32), tl.full((), z_loss, tl.float32)
    softcap, logit_scale = tl.full((), softcap, tl.float32), tl.full((), logit_scale, tl.float32)

    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    row_gradient = gradient + row * gradient_stride
    label = tl.load(target + row)
    if label == ignore_index:
        if not LSE_IS_KNOWN:
            tl.store(loss + row, 0.0)
            tl.store(lse + 2 * row, 0.0)
            tl.store(lse + 2 * row + 1, 0.0)
        if WRITES_GRADIENT:
            zeros = tl.zeros((DEPTH, WIDTH), dtype=gradient.dtype.element_ty)
            for first in range(0, columns, DEPTH * WIDTH):
                tl.store(row_gradient + first + tile, zeros, mask=first + tile < columns)
    else:
        is_label = (label >= 0) & (label < columns)
        if not (IS_PART or is_label):
            tl.device_print("liger: label out of range, its loss is NaN: ", label)
        x_label = tl.load(row_logits + label, mask=is_label, other=0.0)
        z_label = scaled_z(x_label, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)

        if LSE_IS_KNOWN:
            top = tl.load(lse + 2 * row)
            above = tl.load(lse + 2 * row + 1)
            tl.debug_barrier()  # every warp has read the label's logit before another writes its gradient there
        else:
            # Each of WIDTH lanes keeps its own maximum and sum, over DEPTH elements that one thread holds: no
            # exchange between threads until the row is read. The first maximum is finite, so that a lane of -inf
            # stays 0, not NaN.
            peak = tl.full((WIDTH,), -3.4028234663852886e38, dtype=tl.float32)
            total = tl.zeros((WIDTH,), dtype=tl.float32)
            z_sum = tl.zeros((WIDTH,), dtype=tl.float32)
            for first in range(0, whole, DEPTH * WIDTH):
                peak, total, z_sum = _fold(
                    row_logits, first + tile, columns, padded, peak, total, z_sum, logit_scale, softcap,
                    HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP, MASKED=False,
                )  # fmt: skip
            if whole < columns:
                peak, total, z_sum = _fold(
                    row_logits, whole + tile, columns, padded, peak, total, z_sum, logit_scale, softcap,
                    HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP, MASKED=True,
                )  # fmt: skip
            top = tl.max(peak, axis=0)
            above = tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
            value = top - z_label + above
            if HAS_SMOOTHING:
                mean = tl.sum(z_sum, axis=0) / columns
                value = (1.0 - label_smoothing) * value + label_smoothing * (top - mean + above)
            value += z_loss * (top + above) * (top + above)
            value = z_label if IS_PART else tl.where(is_label, value, float("nan"))
            tl.store(loss + row, value)
            tl.store(lse + 2 * row, top)
            tl.store(lse + 2 * row + 1, above)

        if WRITES_GRADIENT:
            factor = logit_scale if IS_PART else tl.where(is_label, logit_scale, float("nan"))
            if HAS_UPSTREAM:
                factor *= tl.load(upstream + row * upstream_stride).to(tl.float32)
            if HAS_DENOMINATOR:
                factor /= tl.load(denominator).to(tl.float32)
            gain = 1.0 + 2.0 * z_loss * (top + above)
            slope = tl.exp(-above) * gain * factor
            uniform = label_smoothing / columns * factor
            # Backwards: what was read last is still in the L2 cache, even where the row as a whole is not.
            if whole < columns:
                _differentiate(
                    row_logits, row_gradient, whole + tile, padded, top, slope, uniform, logit_scale, softcap,
                    HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP, MASKED=True,
                )  # fmt: skip
            for done in range(0, whole, DEPTH * WIDTH):
                _differentiate(
                    row_logits, row_gradient, whole - done - DEPTH * WIDTH + tile, padded, top, slope, uniform,
                    logit_scale, softcap, HAS_SMOOTHING, HAS_SCALE, HAS_SOFTCAP, MASKED=False,
                )  # fmt: skip
            dz = tl.exp(z_label - top - above) * gain - label_smoothing / columns - (1.0 - label_smoothing)
            if HAS_SOFTCAP:
                dz *= softcap_c(x_label, logit_scale, softcap, HAS_SCALE)
            tl.debug_barrier()  # the label's element has been written with its tile
            tl.store(row_gradient + label, (dz * factor).to(gradient.dtype.element_ty), mask=is_label)


def tile_of(columns: int, itemsize: int, l2_bytes: int) -> tuple[int, int, int]:
    """(depth, width, warps) of a tile: 8 neighbouring columns a thread, `depth` times over.

    A multiprocessor works on 32 warps: on four rows at once, on two, or on one alone. One row's reductions hide behind
    another's reading, so more are better as long as the rows that the GPU is at are in its L2 cache, where the second
    reading finds them. An H200's memory is faster than an H100's, and its two rows need not fit. GPUs whose cache is
    larger than an H100's 50 MiB are taken to be like it.
    """
    four, two = (100 * 2**10, 400 * 2**10) if l2_bytes > 56 * 2**20 else (80 * 2**10, 160 * 2**10)
    row_bytes = columns * itemsize
    most = 2048 if row_bytes <= four else 4096 if row_bytes <= two else 8192
    width = min(max(next_power_of_2(columns), 128), most)
    depth = min(next_power_of_2(-(-columns // width)), 4 if itemsize == 2 else 2)
    return depth, width, max(width // 256, 1)


def fill_rows(
    logits: Tensor, target: Tensor, options: Options, loss: Tensor | None, lse: Tensor, gradient: Tensor | None = None,
    *, upstream: Tensor | None = None, denominator: Tensor | None = None, padded: int | None = None,
    part: bool = False,
) -> None:  # fmt: skip
    """Write `loss` and `lse`, or read `lse` where `loss` is None; write `gradient` if there is one.

    logits and gradient: (M, V), rows any stride apart; they may be the same. target, loss: (M,). lse: (M, 2),
    contiguous. `upstream` (0-d or (M,)) multiplies the gradient and `denominator` (0-d) divides it; the loss is
    neither. `padded`, at least V: up to that column, the memory of both may be overwritten.

    `part`: the columns are a part of longer rows, and a label outside them is elsewhere. `lse` is the part's own where
    it is written and the whole row's where it is read; `loss` receives the label's z, 0 where that is elsewhere. There
    is no label smoothing then.
    """
    rows, columns = logits.shape
    if not rows:
        return
    if not runs_kernels(logits):
        _reference_fill(logits, target, options, loss, lse, gradient, upstream, denominator, part)
        return
    depth, width, warps = tile_of(columns, logits.element_size(), l2_bytes(logits))
    output = logits if gradient is None else gradient
    launch(
        _rows_kernel, (rows,), logits, target, upstream, denominator, loss, lse, output, logits.stride(0),
        output.stride(0), upstream.stride(0) if upstream is not None and upstream.dim() else 0, columns,
        columns if padded is None else padded, options.ignore_index,
        options.label_smoothing, options.z_loss, options.softcap or 1.0, options.logit_scale,
        HAS_SMOOTHING=options.label_smoothing != 0, HAS_SCALE=options.logit_scale != 1,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_UPSTREAM=upstream is not None, HAS_DENOMINATOR=denominator is not None, LSE_IS_KNOWN=loss is None,
        WRITES_GRADIENT=gradient is not None, IS_PART=part, DEPTH=depth, WIDTH=width, num_warps=warps,
    )  # fmt: skip
