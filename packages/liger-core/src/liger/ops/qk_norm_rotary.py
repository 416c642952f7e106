r"""RMSNorm of every head of q and of k, then rotary position embedding, in one pass over both.

For one head x of D columns, with s = offset + weight, and Rot the rotation of `rotary`, which turns the first R ≤ D:

    r   = 1 / sqrt(mean(x²) + eps)           x̂ = x · r
    y   = Rot(s · x̂)
    dx  = r · (g − x̂ · mean(g · x̂))          g = s · Rotᵀ(dy)
    dw  = Σ_tokens,heads x̂ · Rotᵀ(dy)

All of it runs in fp32. Forward rounds where the two steps do: with `cast="llama"` x̂ and then s · x̂, with "gemma" only
s · x̂, as `rms_norm`; at the end y, to the promoted dtype of that and cos, as `rotary`. A gradient is rounded once.

Only the inputs are kept; backward computes r and x̂ again. The weights' gradients are summed by a fixed number of
programs, each over its own tokens, and then over the programs, q's and k's at once: see `column_sums`.

q and k are read where they lie, whatever their strides. Results have their shapes, and in memory always the heads of a
token side by side, (B, S, H, D): so the projections write q and k and read their gradients, and so attention, torch's
and FlashAttention's alike, reads them, as a transposed view or as they are, without a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger.ops.column_sums import column_sums
from liger.ops.heads import (
    check_shapes,
    empty_heads,
    readable_angles,
    strides_of_angles,
    strides_of_heads,
    with_contiguous_columns,
)
from liger.ops.launch import jit, launch, next_power_of_2, runs_kernels, sm_count, tl
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.rms_norm import Cast
from liger.ops.rms_norm import reference as reference_norm
from liger.ops.rotary import reference as reference_rotary

_MAX_COLUMNS = 1024
_FORWARD_TILE, _BACKWARD_TILE = 4096, 2048  # elements worked on at once; more heads than that go in turns


def reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    unsqueeze_dim: int = 2,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rotary` in plain torch: the specification, and what devices without Triton run."""
    q = reference_norm(q, q_weight, eps, offset=offset, cast=cast)
    k = reference_norm(k, k_weight, eps, offset=offset, cast=cast)
    return reference_rotary(q, k, cos, sin, unsqueeze_dim)


@jit(varying=())
def _partner_of(column, ROTATED: tl.constexpr):
    """The column that a column is rotated with; past the rotated ones, itself."""
    half: tl.constexpr = ROTATED // 2
    return tl.where(column < half, column + half, tl.where(column < ROTATED, column - half, column))


@jit(varying=())
def _load_angles(cos, sin, ROTATED: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a column and its partner are multiplied by: of a token, 1 and 0 past the rotated columns."""
    column = tl.arange(0, BLOCK_COLUMNS)
    partner = _partner_of(column, ROTATED)
    own = tl.load(cos + column, mask=column < ROTATED, other=1.0).to(tl.float32)
    other = tl.load(sin + (partner if TRANSPOSED else column), mask=column < ROTATED, other=0.0).to(tl.float32)
    return own, tl.where((column < ROTATED // 2) != TRANSPOSED, -other, other)


@jit(varying=())
def _load_scale(weight, column, COLUMNS: tl.constexpr, OFFSET: tl.constexpr):
    scale = 1.0
    if weight is not None:
        scale = tl.load(weight + column, mask=column < COLUMNS, other=0.0).to(tl.float32)[None, :] + OFFSET
    return scale


@jit(varying=())
def _scaled(x, r, scale, weight, LLAMA: tl.constexpr):
    """s · x̂ in fp32, rounded as rms_norm rounds it."""
    out = x.to(tl.float32) * r
    if weight is None:
        out = out.to(x.dtype).to(tl.float32)
    elif LLAMA:
        out = out.to(x.dtype).to(tl.float32) * scale
        if weight.dtype.element_ty == x.dtype:  # else their promoted dtype is fp32
            out = out.to(x.dtype).to(tl.float32)
    else:
        out = (out * scale).to(x.dtype).to(tl.float32)
    return out


@jit(varying=())
def _forward_heads(
    x, y, weight, head_stride, own, other, eps, OFFSET: tl.constexpr, LLAMA: tl.constexpr, HEADS: tl.constexpr,
    COLUMNS: tl.constexpr, ROTATED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the heads of one token at `x`, normalised and rotated, to `y`."""
    column = tl.arange(0, BLOCK_COLUMNS)
    partner = _partner_of(column, ROTATED)
    scale = _load_scale(weight, column, COLUMNS, OFFSET)
    partner_scale = _load_scale(weight, partner, COLUMNS, OFFSET)
    for first in tl.static_range(0, HEADS, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS).to(tl.int64)[:, None]
        inside = (head < HEADS) & (column < COLUMNS)[None, :]
        x_own = tl.load(x + head * head_stride + column[None, :], mask=inside, other=0.0)
        x_partner = tl.load(x + head * head_stride + partner[None, :], mask=inside, other=0.0)  # from the L1 cache
        x32 = x_own.to(tl.float32)
        r = tl.rsqrt((tl.sum(x32 * x32, axis=1) / COLUMNS + eps).to(tl.float32))[:, None]
        out = (
            _scaled(x_own, r, scale, weight, LLAMA) * own + _scaled(x_partner, r, partner_scale, weight, LLAMA) * other
        )
        tl.store(y + head * COLUMNS + column[None, :], out.to(y.dtype.element_ty), mask=inside)


@jit(varying=("tokens",))
def _forward_kernel(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, tokens, q_batch_stride, q_token_stride, q_head_stride,
    k_batch_stride, k_token_stride, k_head_stride, cos_batch_stride, cos_token_stride, eps,
    OFFSET: tl.constexpr, LLAMA: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, COLUMNS: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch = program // tokens
    token = program - batch * tokens
    angles = batch * cos_batch_stride + token * cos_token_stride
    own, other = _load_angles(cos + angles, sin + angles, ROTATED, BLOCK_COLUMNS, False)
    _forward_heads(
        q + batch * q_batch_stride + token * q_token_stride, q_out + program * Q_HEADS * COLUMNS, q_weight,
        q_head_stride, own[None, :], other[None, :], eps, OFFSET, LLAMA, Q_HEADS, COLUMNS, ROTATED, BLOCK_Q,
        BLOCK_COLUMNS,
    )  # fmt: skip
    _forward_heads(
        k + batch * k_batch_stride + token * k_token_stride, k_out + program * K_HEADS * COLUMNS, k_weight,
        k_head_stride, own[None, :], other[None, :], eps, OFFSET, LLAMA, K_HEADS, COLUMNS, ROTATED, BLOCK_K,
        BLOCK_COLUMNS,
    )  # fmt: skip


@jit(varying=())
def _backward_heads(
    dy, x, dx, dw_sum, scale, dy_head_stride, x_head_stride, own, other, eps, NEEDS_DW: tl.constexpr,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr, ROTATED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the heads of one token at `x` to `dx`; return `dw_sum` with their part added."""
    column = tl.arange(0, BLOCK_COLUMNS)
    partner = _partner_of(column, ROTATED)
    for first in tl.static_range(0, HEADS, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS).to(tl.int64)[:, None]
        inside = (head < HEADS) & (column < COLUMNS)[None, :]
        dy_own = tl.load(dy + head * dy_head_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dy_partner = tl.load(dy + head * dy_head_stride + partner[None, :], mask=inside, other=0.0).to(tl.float32)
        x32 = tl.load(x + head * x_head_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt((tl.sum(x32 * x32, axis=1) / COLUMNS + eps).to(tl.float32))[:, None]
        x_hat = x32 * r
        g = dy_own * own + dy_partner * other
        if NEEDS_DW:
            dw_sum += g * x_hat
        g = g * scale
        projection = tl.sum(g * x_hat, axis=1) / COLUMNS
        out = r * (g - x_hat * projection[:, None])
        tl.store(dx + head * COLUMNS + column[None, :], out.to(dx.dtype.element_ty), mask=inside)
    return dw_sum


@jit(varying=("tokens", "all_tokens"))
def _backward_kernel(
    dy1, x1, dx1, weight1, dy2, x2, dx2, weight2, cos, sin, dw, tokens, all_tokens,
    dy1_batch_stride, dy1_token_stride, dy1_head_stride, x1_batch_stride, x1_token_stride, x1_head_stride,
    dy2_batch_stride, dy2_token_stride, dy2_head_stride, x2_batch_stride, x2_token_stride, x2_head_stride,
    cos_batch_stride, cos_token_stride, eps,
    OFFSET: tl.constexpr, NEEDS_DW: tl.constexpr, HEADS1: tl.constexpr, HEADS2: tl.constexpr, COLUMNS: tl.constexpr,
    ROTATED: tl.constexpr, BLOCK1: tl.constexpr, BLOCK2: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """q and k are 1 and 2; where only one of them takes a gradient, that one is 1 and there is no 2."""
    first = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    scale1 = _load_scale(weight1, column, COLUMNS, OFFSET)
    scale2 = _load_scale(weight2, column, COLUMNS, OFFSET)
    dw1_sum = tl.zeros((BLOCK1, BLOCK_COLUMNS), dtype=tl.float32)
    dw2_sum = tl.zeros((BLOCK2, BLOCK_COLUMNS), dtype=tl.float32)

    # As in rms_norm, few programs fit beside these sums: the next tokens are fetched while one is worked on.
    for at in tl.range(first, all_tokens, tl.num_programs(0), num_stages=STAGES):
        batch = at // tokens
        token = at - batch * tokens
        angles = batch * cos_batch_stride + token * cos_token_stride
        own, other = _load_angles(cos + angles, sin + angles, ROTATED, BLOCK_COLUMNS, True)
        dw1_sum = _backward_heads(
            dy1 + batch * dy1_batch_stride + token * dy1_token_stride,
            x1 + batch * x1_batch_stride + token * x1_token_stride, dx1 + at * HEADS1 * COLUMNS, dw1_sum, scale1,
            dy1_head_stride, x1_head_stride, own[None, :], other[None, :], eps, NEEDS_DW, HEADS1, COLUMNS, ROTATED,
            BLOCK1, BLOCK_COLUMNS,
        )  # fmt: skip
        if HEADS2 > 0:
            dw2_sum = _backward_heads(
                dy2 + batch * dy2_batch_stride + token * dy2_token_stride,
                x2 + batch * x2_batch_stride + token * x2_token_stride, dx2 + at * HEADS2 * COLUMNS, dw2_sum, scale2,
                dy2_head_stride, x2_head_stride, own[None, :], other[None, :], eps, NEEDS_DW, HEADS2, COLUMNS,
                ROTATED, BLOCK2, BLOCK_COLUMNS,
            )  # fmt: skip

    if NEEDS_DW:
        parts: tl.constexpr = 1 if HEADS2 == 0 else 2
        dw += first * parts * COLUMNS + column
        tl.store(dw, tl.sum(dw1_sum, axis=0), mask=column < COLUMNS)
        if HEADS2 > 0:
            tl.store(dw + COLUMNS, tl.sum(dw2_sum, axis=0), mask=column < COLUMNS)


def _heads_at_once(heads: int, block_columns: int, tile: int) -> int:
    return min(next_power_of_2(max(heads, 1)), max(1, tile // block_columns))


def _empty_out(x: Tensor, weight: Tensor | None, cos: Tensor, cast: Cast, head_dim: int) -> Tensor:
    normed = x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    return empty_heads(x, torch.promote_types(normed, cos.dtype), head_dim, token_major=True)


def _launch_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    offset: float, cast: Cast, head_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q_out, k_out = _empty_out(q, q_weight, cos, cast, head_dim), _empty_out(k, k_weight, cos, cast, head_dim)
    shape = q.shape
    tokens, q_heads, k_heads, columns = shape[3 - head_dim], shape[head_dim], k.shape[head_dim], shape[3]
    block_columns = next_power_of_2(columns)
    block_q = _heads_at_once(q_heads, block_columns, _FORWARD_TILE)
    if shape[0] * tokens:
        launch(
            _forward_kernel, (shape[0] * tokens,), q, k, q_out, k_out, q_weight, k_weight, cos, sin, tokens,
            *strides_of_heads(q, head_dim), *strides_of_heads(k, head_dim), *strides_of_angles(cos), eps,
            OFFSET=offset, LLAMA=cast == "llama", Q_HEADS=q_heads, K_HEADS=k_heads, COLUMNS=columns,
            ROTATED=cos.shape[2], BLOCK_Q=block_q, BLOCK_K=_heads_at_once(k_heads, block_columns, _FORWARD_TILE),
            BLOCK_COLUMNS=block_columns, num_warps=min(max(block_q * block_columns // 512, 1), 8),
        )  # fmt: skip
    return q_out, k_out


_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q or k in backward: dy, x, dx and the weight."""


def _launch_backward(
    parts: list[_Part], cos: Tensor, sin: Tensor, eps: float, offset: float, head_dim: int, needs_dw: bool
) -> list[Tensor]:
    """Fill the dx of one part or two. Returns the gradients of their weights if one of them is needed, else none."""
    shape = parts[0][1].shape
    tokens, columns = shape[3 - head_dim], shape[3]
    all_tokens = shape[0] * tokens
    block_columns = next_power_of_2(columns)
    # Two programs to a multiprocessor. The next tokens wait in its shared memory: x, and dy twice, for the partners.
    heads, blocks, strides, waiting = [], [], [], 0
    for dy, x, _, _ in parts:
        count = x.shape[head_dim]
        block = _heads_at_once(count, block_columns, _BACKWARD_TILE)
        heads.append(count)
        blocks.append(block)
        strides += [*strides_of_heads(dy, head_dim), *strides_of_heads(x, head_dim)]
        waiting += -(-count // block) * block * block_columns * (2 * dy.element_size() + x.element_size())
    second: tuple[Tensor | None, ...] = (None,) * 4
    if len(parts) == 2:
        second = parts[1]
    else:
        heads, blocks, strides = [*heads, 0], [*blocks, 1], [*strides, *[0] * 6]
    programs, dw = all_tokens, None
    if needs_dw:
        programs = min(all_tokens, 2 * sm_count(cos))
        dw = cos.new_empty(programs, len(parts), columns, dtype=torch.float32)
    if programs:
        launch(
            _backward_kernel, (programs,), *parts[0], *second, cos, sin, dw, tokens, all_tokens, *strides,
            *strides_of_angles(cos), eps,
            OFFSET=offset, NEEDS_DW=needs_dw, HEADS1=heads[0], HEADS2=heads[1], COLUMNS=columns,
            ROTATED=cos.shape[2], BLOCK1=blocks[0], BLOCK2=blocks[1], BLOCK_COLUMNS=block_columns,
            STAGES=min(3, 1 + 100 * 1024 // max(waiting, 1)) if needs_dw else 1,
            num_warps=min(max(blocks[0] * block_columns // 256, 1), 8),
        )  # fmt: skip
    if dw is None:
        return []
    return column_sums(dw, *(torch.float32 if weight is None else weight.dtype for _, _, _, weight in parts))


@named("qk_norm_rotary")
class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
        eps: float, offset: float, cast: Cast, head_dim: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        q, k = with_contiguous_columns(q), with_contiguous_columns(k)
        q_weight = None if q_weight is None else q_weight.contiguous()
        k_weight = None if k_weight is None else k_weight.contiguous()
        cos, sin = readable_angles(cos, sin)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.head_dim = eps, offset, head_dim
        return _launch_forward(q, k, q_weight, k_weight, cos, sin, eps, offset, cast, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        needs_dq, needs_dk, needs_dq_weight, needs_dk_weight = ctx.needs_input_grad[:4]
        dq = dk = dq_weight = dk_weight = None
        parts: list[_Part] = []
        needs_dw = False
        if dq_out is not None and (needs_dq or needs_dq_weight):
            dq = empty_heads(q, q.dtype, ctx.head_dim, token_major=True)
            parts.append((with_contiguous_columns(dq_out), q, dq, q_weight))
            needs_dw = needs_dq_weight
        if dk_out is not None and (needs_dk or needs_dk_weight):
            dk = empty_heads(k, k.dtype, ctx.head_dim, token_major=True)
            parts.append((with_contiguous_columns(dk_out), k, dk, k_weight))
            needs_dw = needs_dw or needs_dk_weight
        if parts:
            sums = _launch_backward(parts, cos, sin, ctx.eps, ctx.offset, ctx.head_dim, needs_dw)
            if dq is not None and needs_dq_weight:
                dq_weight = sums[0]
            if dk is not None and needs_dk_weight:
                dk_weight = sums[-1]
        return (
            dq if needs_dq else None, dk if needs_dk else None, dq_weight, dk_weight, None, None, None, None, None, None
        )  # fmt: skip


def qk_norm_rotary(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    cast: Cast = "llama",
    unsqueeze_dim: int = 2,
) -> tuple[Tensor, Tensor]:
    """Normalise every head of `q` and `k` as `rms_norm` does, then rotate it as `rotary` does.

    Args:
        q: (B, S, Hq, D), as a projection leaves it, or (B, Hq, S, D) with `unsqueeze_dim=1`; fp32, bf16, fp16 or fp64,
            any strides.
        k: as q, with Hk heads.
        q_weight: (D,), any of these dtypes; None for no scale.
        k_weight: as q_weight.
        cos: (B, S, R) or (1, S, R) with R even and at most D; any floating-point dtype, on q's device.
        sin: cos's shape and dtype.
        eps: added to the mean of squares.
        offset: added to the weights before they multiply (Gemma's norms: 1.0).
        cast: where the norm rounds, "llama" or "gemma" (see the module's docstring).
        unsqueeze_dim: the dimension of the heads.

    Returns:
        q and k, normalised and rotated: new tensors of the same shapes, (B, S, H, D) in memory, in the promoted dtype
        of the norm's result and cos.

    Raises:
        ValueError: a shape or device is not as above, or `cast` is unknown.
        TypeError: a tensor is not floating-point, k has another dtype than q, or sin than cos.
    """
    _check(q, k, q_weight, k_weight, cos, sin, cast, unsqueeze_dim)
    trains_angles = (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled()
    on_kernels = runs_kernels(q, k, q_weight, k_weight, cos, sin)
    if on_kernels and not trains_angles and 0 < q.shape[3] <= _MAX_COLUMNS:
        return _QKNormRotary.apply(q, k, q_weight, k_weight, cos, sin, eps, offset, cast, unsqueeze_dim)
    return reference(q, k, q_weight, k_weight, cos, sin, eps, offset=offset, cast=cast, unsqueeze_dim=unsqueeze_dim)


_NAMES = ("q", "k", "q_weight", "k_weight", "cos", "sin")


def _check(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, cast: str,
    head_dim: int,
) -> None:  # fmt: skip
    if head_dim not in (1, 2):
        raise ValueError(f"qk_norm_rotary: unsqueeze_dim must be 1 or 2, not {head_dim!r}")
    if cast not in ("llama", "gemma"):
        raise ValueError(f"qk_norm_rotary: cast must be 'llama' or 'gemma', not {cast!r}")
    for name, t in zip(_NAMES, (q, k, q_weight, k_weight, cos, sin), strict=True):
        if t is None:
            continue
        if not t.is_floating_point():
            raise TypeError(f"qk_norm_rotary: {name} must have a floating-point dtype, not {t.dtype}")
        if t.device != q.device:
            raise ValueError(f"qk_norm_rotary: {name} is on {t.device}, expected q's device {q.device}")
    if k.dtype != q.dtype or sin.dtype != cos.dtype:
        raise TypeError(
            f"qk_norm_rotary: k has dtype {k.dtype} and sin {sin.dtype}, expected q's {q.dtype} and cos's {cos.dtype}"
        )
    check_shapes("qk_norm_rotary", q, k, cos, sin, head_dim)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and weight.shape != q.shape[3:]:
            raise ValueError(f"qk_norm_rotary: {name} has shape {tuple(weight.shape)}, expected ({q.shape[3]},)")
