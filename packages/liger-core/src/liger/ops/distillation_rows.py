r"""The rows of linear_distillation: from the logits of student and teacher to their divergence, and its gradient.

For one row of V logits each, x of the student and y of the teacher, T = temperature, and each side's c = softcap:

    cap(x) = c · tanh(logit_scale · x / c)                        logit_scale · x without a softcap
    s = softmax(cap(x) / T)     t = softmax(cap(y) / T)           m = (1 − β) s + β t
    loss = β KL(t ‖ m) + (1 − β) KL(s ‖ m)                        0 < β < 1
    loss = KL(t ‖ s)                                              β = 0
    loss = KL(s ‖ t)                                              β = 1
    KL(a ‖ b) = Σ_j a_j (log a_j − log b_j)                       a class with a_j = 0 adds nothing

    dx_j = f_j (1 − β) s_j (log s_j − log m_j − KL(s ‖ m))        0 < β < 1
    dx_j = f_j (s_j − t_j)                                        β = 0
    dx_j = f_j s_j (log s_j − log t_j − KL(s ‖ t))                β = 1
    f_j  = upstream gradient / denominator · logit_scale / T · (1 − (cap(x_j) / c)²)

It is the generalised Jensen-Shannon divergence of GKD (https://arxiv.org/abs/2306.13649). All of it runs in fp32 (the
reference on fp64: in fp64), and dx is rounded once.

One kernel reads each row three times: for the two sums of exponentials, for the divergence, which the gradient needs,
and for the gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from liger.ops.launch import jit, l2_bytes, launch, runs_kernels, tl
from liger.ops.loss_rows import tile_of
from liger.ops.scaling import Scaling, reference_c, reference_z
from liger.ops.tanh import tanh, tanh_derivative


def _over(scaling: Scaling, temperature: float) -> tuple[float, float]:
    """(a, b) of the logits over the temperature: b · tanh(a · x), or b · x without a softcap, where a is 1."""
    logit_scale, softcap = scaling
    if softcap is None:
        return 1.0, logit_scale / temperature
    return logit_scale / softcap, softcap / temperature


def _shares(beta: float) -> tuple[float, float]:
    """What KL(t ‖ m) and KL(s ‖ m) are multiplied by. At both ends m is one of the two, whose own divergence is 0."""
    return beta or 1.0, (1.0 - beta) or 1.0


def _divergence_of(p: Tensor, log_p: Tensor, log_m: Tensor) -> Tensor:
    return torch.where(p == 0, 0.0, p * (log_p - log_m)).sum(-1)


def _reference_fill(
    student: Tensor, teacher: Tensor, counts: Tensor, beta: float, temperature: float,
    scalings: tuple[Scaling, Scaling], loss: Tensor, with_gradient: bool, upstream: Tensor | None,
    denominator: Tensor | None,
) -> None:  # fmt: skip
    """`fill_distillation_rows` in plain torch."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    x, y = (reference_z(logits.to(wide), scaling) for logits, scaling in zip((student, teacher), scalings, strict=True))
    log_s, log_t = ((capped / temperature).log_softmax(-1) for capped in (x, y))
    s, t = log_s.exp(), log_t.exp()
    if beta == 0:
        log_m = log_s
    elif beta == 1:
        log_m = log_t
    else:
        log_m = torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    of_teacher, of_student = _shares(beta)
    divergence = _divergence_of(s, log_s, log_m)
    value = of_teacher * _divergence_of(t, log_t, log_m) + of_student * divergence
    loss.copy_(torch.where(counts, value, 0.0))
    if not with_gradient:
        return
    dx = s - t if beta == 0 else torch.where(s == 0, 0.0, of_student * s * (log_s - log_m - divergence[:, None]))
    logit_scale, softcap = scalings[0]
    if softcap is not None:
        dx *= reference_c(student.to(wide), scalings[0])
    slope = logit_scale / temperature
    factor = torch.full_like(value, slope) if upstream is None else upstream * slope
    if denominator is not None:
        factor = factor / denominator
    student.copy_((dx * factor.expand_as(value)[:, None]).masked_fill_(~counts[:, None], 0.0))


@jit(varying=())
def _scaled(logits, column, columns, a, b, IS_CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """A tile of logits over the temperature, scaled and capped (see `_over`); and what tanh is taken of."""
    inside = column < columns if MASKED else None
    x = tl.load(logits + column, mask=inside, other=0.0 if MASKED else None, eviction_policy="evict_last")
    x = x.to(tl.float32)
    if IS_CAPPED:
        x = x * a
        z = tanh(x) * b
    else:
        z = x * b
    return z, x


@jit(varying=())
def _fold(logits, column, columns, peak, total, a, b, IS_CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Take a tile into every lane's maximum, and its sum of exponentials relative to it."""
    z, _ = _scaled(logits, column, columns, a, b, IS_CAPPED, MASKED)
    if MASKED:
        z = tl.where(column < columns, z, float("-inf"))
    higher = tl.maximum(peak, z)
    return higher, total * tl.exp(peak - higher) + tl.exp(z - higher)


@jit(varying=())
def _normalizer(logits, whole, columns, a, b, IS_CAPPED: tl.constexpr, WIDTH: tl.constexpr):
    """The row's maximum m, and log Σ_j exp(z_j − m)."""
    # The first maximum is finite, so that a lane of -inf stays 0, not NaN.
    peak = tl.full((WIDTH,), -3.4028234663852886e38, dtype=tl.float32)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for first in range(0, whole, WIDTH):
        peak, total = _fold(logits, first + tl.arange(0, WIDTH), columns, peak, total, a, b, IS_CAPPED, MASKED=False)
    if whole < columns:
        peak, total = _fold(logits, whole + tl.arange(0, WIDTH), columns, peak, total, a, b, IS_CAPPED, MASKED=True)
    top = tl.max(peak, axis=0)
    return top, tl.log(tl.sum(total * tl.exp(peak - top), axis=0))


@jit(varying=())
def _log_probs(z, column, columns, top, above, MASKED: tl.constexpr):
    """The log-probabilities of a tile, -inf outside the row."""
    log_p = (z - top) - above
    return tl.where(column < columns, log_p, float("-inf")) if MASKED else log_p


@jit(varying=())
def _log_mixture(
    log_s, log_t, log_share_of_s, log_share_of_t, IS_FORWARD: tl.constexpr, IS_REVERSE: tl.constexpr
):  # fmt: skip
    """log m."""
    if IS_FORWARD:
        log_m = log_s
    elif IS_REVERSE:
        log_m = log_t
    else:
        a, b = log_s + log_share_of_s, log_t + log_share_of_t
        log_m = tl.maximum(a, b) + tl.log(1.0 + tl.exp(-tl.abs(a - b)))  # the maximum may drop a NaN, not the rest
    return log_m


@jit(varying=())
def _add_divergence(
    student, teacher, column, columns, from_t, from_s, top_s, above_s, top_t, above_t, log_share_of_s, log_share_of_t,
    a_s, b_s, a_t, b_t, CAPS_STUDENT: tl.constexpr, CAPS_TEACHER: tl.constexpr, IS_FORWARD: tl.constexpr,
    IS_REVERSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add a tile's terms of KL(t ‖ m) and KL(s ‖ m) to every lane's sums."""
    z_s, _ = _scaled(student, column, columns, a_s, b_s, CAPS_STUDENT, MASKED)
    z_t, _ = _scaled(teacher, column, columns, a_t, b_t, CAPS_TEACHER, MASKED)
    log_s = _log_probs(z_s, column, columns, top_s, above_s, MASKED)
    log_t = _log_probs(z_t, column, columns, top_t, above_t, MASKED)
    log_m = _log_mixture(log_s, log_t, log_share_of_s, log_share_of_t, IS_FORWARD, IS_REVERSE)
    s, t = tl.exp(log_s), tl.exp(log_t)
    from_t += tl.where(t == 0.0, 0.0, t * (log_t - log_m))
    from_s += tl.where(s == 0.0, 0.0, s * (log_s - log_m))
    return from_t, from_s


@jit(varying=())
def _differentiate(
    student, teacher, column, columns, divergence, factor, top_s, above_s, top_t, above_t, log_share_of_s,
    log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT: tl.constexpr, CAPS_TEACHER: tl.constexpr,
    IS_FORWARD: tl.constexpr, IS_REVERSE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Put the gradient of a tile in the place of the student's logits."""
    z_s, u_s = _scaled(student, column, columns, a_s, b_s, CAPS_STUDENT, MASKED)
    z_t, _ = _scaled(teacher, column, columns, a_t, b_t, CAPS_TEACHER, MASKED)
    log_s = _log_probs(z_s, column, columns, top_s, above_s, MASKED)
    log_t = _log_probs(z_t, column, columns, top_t, above_t, MASKED)
    s = tl.exp(log_s)
    if IS_FORWARD:
        dx = s - tl.exp(log_t)
    else:
        log_m = _log_mixture(log_s, log_t, log_share_of_s, log_share_of_t, IS_FORWARD, IS_REVERSE)
        dx = tl.where(s == 0.0, 0.0, s * (log_s - log_m - divergence))
    if CAPS_STUDENT:
        dx *= tanh_derivative(u_s)
    inside = column < columns if MASKED else None
    tl.store(student + column, (dx * factor).to(student.dtype.element_ty), mask=inside)


@jit(varying=("counts", "upstream", "denominator", "loss", "upstream_stride"))
def _rows_kernel(
    student, teacher, counts, upstream, denominator, loss, student_stride, teacher_stride, upstream_stride, columns,
    share_of_t, share_of_s, log_share_of_s, log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT: tl.constexpr,
    CAPS_TEACHER: tl.constexpr, IS_FORWARD: tl.constexpr, IS_REVERSE: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr, WRITES_GRADIENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, WIDTH)
    whole = columns // WIDTH * WIDTH  # up to here no tile needs a mask
    # inductor hands floats over in fp64
    share_of_t, share_of_s = tl.full((), share_of_t, tl.float32), tl.full((), share_of_s, tl.float32)
    log_share_of_s = tl.full((), log_share_of_s, tl.float32)
    log_share_of_t = tl.full((), log_share_of_t, tl.float32)
    a_s, b_s = tl.full((), a_s, tl.float32), tl.full((), b_s, tl.float32)
    a_t, b_t = tl.full((), a_t, tl.float32), tl.full((), b_t, tl.float32)

    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    if tl.load(counts + row) == 0:
        tl.store(loss + row, 0.0)
        if WRITES_GRADIENT:
            zeros = tl.zeros((WIDTH,), dtype=student.dtype.element_ty)
            for first in range(0, columns, WIDTH):
                tl.store(student + first + lane, zeros, mask=first + lane < columns)
    else:
        top_s, above_s = _normalizer(student, whole, columns, a_s, b_s, CAPS_STUDENT, WIDTH)
        top_t, above_t = _normalizer(teacher, whole, columns, a_t, b_t, CAPS_TEACHER, WIDTH)
        from_t = tl.zeros((WIDTH,), dtype=tl.float32)
        from_s = tl.zeros((WIDTH,), dtype=tl.float32)
        for first in range(0, whole, WIDTH):
            from_t, from_s = _add_divergence(
                student, teacher, first + lane, columns, from_t, from_s, top_s, above_s, top_t, above_t,
                log_share_of_s, log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT, CAPS_TEACHER, IS_FORWARD,
                IS_REVERSE, MASKED=False,
            )  # fmt: skip
        if whole < columns:
            from_t, from_s = _add_divergence(
                student, teacher, whole + lane, columns, from_t, from_s, top_s, above_s, top_t, above_t,
                log_share_of_s, log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT, CAPS_TEACHER, IS_FORWARD,
                IS_REVERSE, MASKED=True,
            )  # fmt: skip
        divergence = tl.sum(from_s, axis=0)
        tl.store(loss + row, share_of_t * tl.sum(from_t, axis=0) + share_of_s * divergence)
        if WRITES_GRADIENT:
            factor = a_s * b_s * share_of_s
            if HAS_UPSTREAM:
                factor *= tl.load(upstream + row * upstream_stride).to(tl.float32)
            if HAS_DENOMINATOR:
                factor /= tl.load(denominator).to(tl.float32)
            for first in range(0, whole, WIDTH):
                _differentiate(
                    student, teacher, first + lane, columns, divergence, factor, top_s, above_s, top_t, above_t,
                    log_share_of_s, log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT, CAPS_TEACHER, IS_FORWARD,
                    IS_REVERSE, MASKED=False,
                )  # fmt: skip
            if whole < columns:
                _differentiate(
                    student, teacher, whole + lane, columns, divergence, factor, top_s, above_s, top_t, above_t,
                    log_share_of_s, log_share_of_t, a_s, b_s, a_t, b_t, CAPS_STUDENT, CAPS_TEACHER, IS_FORWARD,
                    IS_REVERSE, MASKED=True,
                )  # fmt: skip


def fill_distillation_rows(
    student: Tensor, teacher: Tensor, counts: Tensor, beta: float, temperature: float,
    scalings: tuple[Scaling, Scaling], loss: Tensor, *, with_gradient: bool, upstream: Tensor | None = None,
    denominator: Tensor | None = None,
) -> None:  # fmt: skip
    """Write each row's `loss`, and with `with_gradient` its gradient in the place of the student's logits.

    student, teacher: (M, V) logits, rows any stride apart. counts: (M,), bool: the other rows have neither loss nor
    gradient. scalings: the student's and the teacher's. loss: (M,). `upstream` (0-d or (M,)) multiplies the gradient
    and `denominator` (0-d) divides it; the loss is neither.
    """
    rows, columns = student.shape
    if not runs_kernels(student, teacher):
        _reference_fill(
            student, teacher, counts, beta, temperature, scalings, loss, with_gradient, upstream, denominator
        )
        return
    _, width, warps = tile_of(columns, student.element_size() + teacher.element_size(), l2_bytes(student))
    mixes = 0 < beta < 1
    launch(
        _rows_kernel, (rows,), student, teacher, counts, upstream, denominator, loss, student.stride(0),
        teacher.stride(0), upstream.stride(0) if upstream is not None and upstream.dim() else 0, columns,
        *_shares(beta), math.log1p(-beta) if mixes else 0.0, math.log(beta) if mixes else 0.0,
        *_over(scalings[0], temperature), *_over(scalings[1], temperature),
        CAPS_STUDENT=scalings[0].softcap is not None, CAPS_TEACHER=scalings[1].softcap is not None,
        IS_FORWARD=beta == 0, IS_REVERSE=beta == 1, HAS_UPSTREAM=upstream is not None,
        HAS_DENOMINATOR=denominator is not None, WRITES_GRADIENT=with_gradient, WIDTH=width, num_warps=warps,
    )  # fmt: skip
