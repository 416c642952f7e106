r"""The rows of linear_log_prob: from logits and labels to log-probabilities and entropies, and back to gradients.

For one row x of V logits with label t, s = softcap and T = temperature:

    z        = s · tanh(logit_scale · x / s) / T                z = logit_scale · x / T without a softcap
    m        = max_j z_j               a = log Σ_j exp(z_j − m)               p_j = exp(z_j − m − a)
    log_prob = (z_t − m) − a           gap = Σ_j p_j (m − z_j)                entropy = a + gap
    is_top1  = no class has a larger z, and none before t the same

With the upstream gradients g of log_prob and h of entropy:

    dz_j     = g [j = t] − p_j (g + h (log p_j + entropy)) = g [j = t] − p_j (g + h (gap + z_j − m))
    dx_j     = logit_scale / T · (1 − (T z_j / s)²) · dz_j

All of it runs in fp32 (the reference on fp64: in fp64), and dx is rounded once. m, a and gap are kept apart: near
certainty, log p_t and the entropy have digits that a sum with m would have lost; a and gap are never negative.

One kernel reads each logit once, for everything that forward returns. The other reads some columns once more and writes
the gradient in their place. They and the references take differences first, which are exact where logits are near each
other, and then turn them into what `exp2` takes, by coldness = log₂ e / T: their m is that of T z, their a, gap and
log_prob are in base 2. log_prob is kept for backward, whose products may round otherwise: near certainty 1 − p_t would
be that rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liger.ops.launch import jit, l2_bytes, launch, next_power_of_2, runs_kernels, tl
from liger.ops.loss_rows import tile_of
from liger.ops.scaling import Scaling, reference_c, reference_z, scaled_z, softcap_c

_LOG2_E, _LN_2 = math.log2(math.e), math.log(2)
_FAR = -1e4  # exp of it is 0 in every dtype, and 0 · it is 0, where 0 · -inf would be NaN


def _reference_measure(
    logits: Tensor, target: Tensor, ignore_index: int, scaling: Scaling, temperature: float, log_prob: Tensor,
    entropy: Tensor, is_top1: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    """`measure_rows` in plain torch."""
    counts = target != ignore_index
    label = torch.where(counts, target, 0).long()[:, None]
    z, coldness = reference_z(logits, scaling), _LOG2_E / temperature
    largest, top = z.argmax(-1), z.amax(-1)  # the first of equals
    own = (z.gather(-1, label)[:, 0] - top) * coldness
    below = (z - top[:, None]).mul_(coldness).clamp_(min=_FAR)
    exponential = below.exp2()
    total = exponential.sum(-1)
    above = total.log2()
    gap = -exponential.mul_(below).sum(-1) / total
    own -= above
    statistics.copy_(torch.stack((top, above, gap, own), -1))
    log_prob.copy_(torch.where(counts, own * _LN_2, 0.0))
    entropy.copy_(torch.where(counts, (above + gap) * _LN_2, 0.0))
    is_top1.copy_((largest == label[:, 0]) & counts & ~own.isnan())


def _reference_differentiate(
    logits: Tensor, target: Tensor, ignore_index: int, scaling: Scaling, temperature: float, statistics: Tensor,
    log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, first_class: int,
) -> None:  # fmt: skip
    """`differentiate_rows` in plain torch."""
    counts = target != ignore_index
    place = target.long() - first_class
    here = (place >= 0) & (place < logits.shape[-1])
    top, above, gap, own = statistics.unbind(-1)
    column = torch.where(here, place, 0)[:, None]
    below = (reference_z(logits, scaling) - top[:, None]).mul_(_LOG2_E / temperature)
    below.scatter_(-1, column, torch.where(here, own + above, below[:, 0])[:, None]).clamp_(min=_FAR)
    g = torch.zeros_like(top) if log_prob_gradient is None else log_prob_gradient
    h = torch.zeros_like(top) if entropy_gradient is None else entropy_gradient * _LN_2
    dx = (below - above[:, None]).exp2_()
    dx *= (g + h * gap)[:, None] if entropy_gradient is None else below.add_(gap[:, None]).mul_(h[:, None]) + g[:, None]
    dx.neg_().scatter_(-1, column, dx.gather(-1, column) + torch.where(here, g, 0.0)[:, None])
    if scaling.softcap is not None:
        dx *= reference_c(logits, scaling)
    logits.copy_(dx.mul_(scaling.logit_scale / temperature).masked_fill_(~counts[:, None], 0.0))


@jit(varying=())
def _fold(
    logits, column, columns, peak, total, gap, logit_scale, softcap, coldness, HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take a tile into every lane's maximum, and its sums relative to it."""
    inside = column < columns if MASKED else None
    x = tl.load(logits + column, mask=inside, other=0.0 if MASKED else None, eviction_policy="evict_first")
    z = scaled_z(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    if MASKED:
        z = tl.where(inside, z, float("-inf"))
    higher = tl.maximum(peak, tl.max(z, axis=0))
    below = (z - higher[None, :]) * coldness
    below = tl.where(below < -1e4, -1e4, below)  # 0 · -inf would be NaN; a NaN stays one
    exponential = tl.exp2(below)
    risen = tl.minimum((higher - peak) * coldness, 1e4)
    decay = tl.exp2(-risen)
    gap = decay * (gap + risen * total) - tl.sum(exponential * below, axis=0)
    return higher, decay * total + tl.sum(exponential, axis=0), gap


@jit(varying=("target", "log_prob", "entropy", "is_top1", "statistics", "ignore_index"), registers=64)
def _measure_kernel(
    logits, target, log_prob, entropy, is_top1, statistics, logits_stride, columns, ignore_index, softcap,
    logit_scale, coldness, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = DEPTH * WIDTH
    LN2: tl.constexpr = 0.6931471805599453
    tile = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = columns // SIZE * SIZE  # up to here no tile needs a mask
    # inductor hands floats over in fp64
    softcap, logit_scale = tl.full((), softcap, tl.float32), tl.full((), logit_scale, tl.float32)
    coldness = tl.full((), coldness, tl.float32)

    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    label = tl.load(target + row)
    if label == ignore_index:
        tl.store(log_prob + row, 0.0)
        tl.store(entropy + row, 0.0)
        tl.store(is_top1 + row, False)
        for i in tl.static_range(4):
            tl.store(statistics + 4 * row + i, 0.0)
    else:
        is_label = (label >= 0) & (label < columns)
        if not is_label:
            tl.device_print("liger: label out of range, its log-probability is NaN: ", label)
        z_label = tl.load(row_logits + label, mask=is_label, other=float("nan"))
        z_label = scaled_z(z_label, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        place = tl.where(is_label, label, 0).to(tl.int32)
        place_tile = place // SIZE * SIZE
        # Each of WIDTH lanes keeps its own sums, as in `loss_rows`. The first maximum is finite, so that a lane of
        # -inf stays 0, not NaN.
        peak = tl.full((WIDTH,), -3.4028234663852886e38, dtype=tl.float32)
        total = tl.zeros((WIDTH,), dtype=tl.float32)
        gap = tl.zeros((WIDTH,), dtype=tl.float32)
        for first in range(0, place_tile, SIZE):
            peak, total, gap = _fold(
                row_logits, first + tile, columns, peak, total, gap, logit_scale, softcap, coldness, HAS_SCALE,
                HAS_SOFTCAP, MASKED=False,
            )  # fmt: skip
        # An equal before the label is the argmax in its place, one behind it is not: the label's tile is looked at
        # element by element, the others by their maxima.
        beaten = (place_tile > 0) & (tl.max(peak, axis=0) >= z_label)
        column = place_tile + tile
        z = tl.load(row_logits + column, mask=column < columns, other=0.0)
        z = scaled_z(z, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
        beats = ((z > z_label) | ((z == z_label) & (column < place))) & (column < columns)
        beaten = beaten | (tl.max(tl.max(beats.to(tl.int32), axis=0), axis=0) > 0)
        peak, total, gap = _fold(
            row_logits, column, columns, peak, total, gap, logit_scale, softcap, coldness, HAS_SCALE, HAS_SOFTCAP,
            MASKED=True,
        )  # fmt: skip
        for first in range(place_tile + SIZE, whole, SIZE):
            peak, total, gap = _fold(
                row_logits, first + tile, columns, peak, total, gap, logit_scale, softcap, coldness, HAS_SCALE,
                HAS_SOFTCAP, MASKED=False,
            )  # fmt: skip
        if (place_tile < whole) & (whole < columns):
            peak, total, gap = _fold(
                row_logits, whole + tile, columns, peak, total, gap, logit_scale, softcap, coldness, HAS_SCALE,
                HAS_SOFTCAP, MASKED=True,
            )  # fmt: skip
        top = tl.max(peak, axis=0)
        risen = tl.minimum((top - peak) * coldness, 1e4)
        decay = tl.exp2(-risen)
        whole_sum = tl.sum(decay * total, axis=0)
        mean_gap = tl.sum(decay * (gap + risen * total), axis=0) / whole_sum
        above = tl.log2(whole_sum)
        below = (z_label - top) * coldness
        # A compiler may round z twice in different ways: neither may have the wrong sign for it.
        own = tl.where(below > above, 0.0, below - above)
        tl.store(log_prob + row, own * LN2)
        tl.store(entropy + row, tl.where(above + mean_gap < 0.0, 0.0, above + mean_gap) * LN2)
        tl.store(is_top1 + row, is_label & (beaten == 0) & (top <= z_label))
        tl.store(statistics + 4 * row, top)
        tl.store(statistics + 4 * row + 1, above)
        tl.store(statistics + 4 * row + 2, mean_gap)
        tl.store(statistics + 4 * row + 3, own)


@jit(varying=())
def _differentiate(
    logits, column, columns, label, top, above, gap, own, g, h, logit_scale, softcap, coldness, HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LOG_PROB: tl.constexpr, HAS_ENTROPY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Put the gradient of a tile in the place of its logits."""
    inside = column < columns if MASKED else None
    x = tl.load(logits + column, mask=inside, other=0.0 if MASKED else None, eviction_policy="evict_first")
    z = scaled_z(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP)
    below = tl.where(column == label, own + above, (z - top) * coldness)
    slope = tl.zeros_like(below)
    if HAS_LOG_PROB:
        slope += g
    if HAS_ENTROPY:
        slope += h * (gap + tl.where(below < -1e4, -1e4, below))  # as in `_fold`
    dx = -tl.exp2(below - above) * slope
    if HAS_LOG_PROB:
        dx += tl.where(column == label, g, 0.0)
    dx *= logit_scale * coldness * 0.6931471805599453
    if HAS_SOFTCAP:
        dx *= softcap_c(x, logit_scale, softcap, HAS_SCALE)
    tl.store(logits + column, dx.to(logits.dtype.element_ty), mask=inside, eviction_policy="evict_first")


@jit(
    varying=(
        "target", "statistics", "log_prob_gradient", "entropy_gradient", "log_prob_stride", "entropy_stride",
        "first_class", "ignore_index",
    )
)  # fmt: skip
def _differentiate_kernel(
    logits, target, statistics, log_prob_gradient, entropy_gradient, logits_stride, log_prob_stride, entropy_stride,
    columns, classes, first_class, ignore_index, softcap, logit_scale, coldness, HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_LOG_PROB: tl.constexpr, HAS_ENTROPY: tl.constexpr, DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    tile = tl.arange(0, DEPTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    whole = columns // (DEPTH * WIDTH) * (DEPTH * WIDTH)
    softcap, logit_scale = tl.full((), softcap, tl.float32), tl.full((), logit_scale, tl.float32)
    coldness = tl.full((), coldness, tl.float32)

    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * logits_stride
    label = tl.load(target + row)
    if label == ignore_index:
        zeros = tl.zeros((DEPTH, WIDTH), dtype=logits.dtype.element_ty)
        for first in range(0, columns, DEPTH * WIDTH):
            tl.store(row_logits + first + tile, zeros, mask=first + tile < columns)
    else:
        top = tl.load(statistics + 4 * row)
        above = tl.load(statistics + 4 * row + 1)
        gap = tl.load(statistics + 4 * row + 2)
        own = tl.load(statistics + 4 * row + 3)
        g, h = 0.0, 0.0
        if HAS_LOG_PROB:
            g = tl.load(log_prob_gradient + row * log_prob_stride)
            g = tl.where((label >= 0) & (label < classes), g, float("nan"))
        place = (label - first_class).to(tl.int32)
        if HAS_ENTROPY:
            h = tl.load(entropy_gradient + row * entropy_stride) * 0.6931471805599453
        for first in range(0, whole, DEPTH * WIDTH):
            _differentiate(
                row_logits, first + tile, columns, place, top, above, gap, own, g, h, logit_scale, softcap,
                coldness, HAS_SCALE, HAS_SOFTCAP, HAS_LOG_PROB, HAS_ENTROPY, MASKED=False,
            )  # fmt: skip
        if whole < columns:
            _differentiate(
                row_logits, whole + tile, columns, place, top, above, gap, own, g, h, logit_scale, softcap,
                coldness, HAS_SCALE, HAS_SOFTCAP, HAS_LOG_PROB, HAS_ENTROPY, MASKED=True,
            )  # fmt: skip


def measure_rows(
    logits: Tensor, target: Tensor, ignore_index: int, scaling: Scaling, temperature: float, log_prob: Tensor,
    entropy: Tensor, is_top1: Tensor, statistics: Tensor,
) -> None:  # fmt: skip
    """Write what forward returns, (M,) each, and the m, a, gap and log_prob of every row, (M, 4), contiguous.

    logits: (M, V), rows any stride apart.
    """
    rows, columns = logits.shape
    if not runs_kernels(logits):
        outputs = (log_prob, entropy, is_top1, statistics)
        _reference_measure(logits, target, ignore_index, scaling, temperature, *outputs)
        return
    width = min(max(next_power_of_2(columns), 128), 1024)  # each row is read once: many small programs hide its latency
    launch(
        _measure_kernel, (rows,), logits, target, log_prob, entropy, is_top1, statistics, logits.stride(0),
        columns, ignore_index, scaling.softcap or 1.0, scaling.logit_scale, _LOG2_E / temperature,
        HAS_SCALE=scaling.logit_scale != 1, HAS_SOFTCAP=scaling.softcap is not None, DEPTH=2, WIDTH=width,
        num_warps=4,
    )  # fmt: skip


def differentiate_rows(
    logits: Tensor, target: Tensor, ignore_index: int, scaling: Scaling, temperature: float, statistics: Tensor,
    log_prob_gradient: Tensor | None, entropy_gradient: Tensor | None, first_class: int, classes: int,
) -> None:  # fmt: skip
    """Overwrite logits with their gradient, from `statistics` and the upstream gradients, (M,), any stride.

    logits: (M, some of the `classes`, from `first_class` on), rows any stride apart.
    """
    rows, columns = logits.shape
    upstream = (log_prob_gradient, entropy_gradient)
    if not runs_kernels(logits):
        _reference_differentiate(logits, target, ignore_index, scaling, temperature, statistics, *upstream, first_class)
        return
    depth, width, warps = tile_of(columns, logits.element_size(), l2_bytes(logits))
    launch(
        _differentiate_kernel, (rows,), logits, target, statistics, *upstream, logits.stride(0),
        *(0 if g is None else g.stride(0) for g in upstream), columns, classes, first_class, ignore_index,
        scaling.softcap or 1.0, scaling.logit_scale, _LOG2_E / temperature, HAS_SCALE=scaling.logit_scale != 1,
        HAS_SOFTCAP=scaling.softcap is not None, HAS_LOG_PROB=log_prob_gradient is not None,
        HAS_ENTROPY=entropy_gradient is not None, DEPTH=depth, WIDTH=width, num_warps=warps,
    )  # fmt: skip
