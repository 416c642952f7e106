"""The kernels of qk_norm_rotary, which has the formulas: the heads of a token side by side, forward and backward.

A rotation needs a column's partner, which another thread has: each head is read twice, the second time in the order of
the partners.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger.ops.column_sums import column_sums
from liger.ops.heads import empty_heads, strides_of_angles, strides_of_heads
from liger.ops.launch import jit, launch, next_power_of_2, shared_bytes, sm_count, tl
from liger.ops.rms_norm import Cast

MAX_COLUMNS = 1024
_TILE = 2048  # elements that a program works on at once; more heads than that go in turns


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
        r = tl.where(head < HEADS, r, 0.0)  # a head that is not there would be 0 · inf without an eps
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
    STAGES: tl.constexpr, PARTS: tl.constexpr,
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
        dw += first * PARTS * COLUMNS + column
        tl.store(dw, tl.sum(dw1_sum, axis=0), mask=column < COLUMNS)
        if PARTS > 1:
            tl.store(dw + COLUMNS, tl.sum(dw2_sum, axis=0), mask=column < COLUMNS)


def _heads_at_once(heads: int, block_columns: int) -> int:
    return min(next_power_of_2(max(heads, 1)), max(1, _TILE // block_columns))


def _empty_out(x: Tensor, weight: Tensor | None, cos: Tensor, cast: Cast, head_dim: int) -> Tensor:
    normed = x.dtype if weight is None or cast == "gemma" else torch.promote_types(x.dtype, weight.dtype)
    return empty_heads(x, torch.promote_types(normed, cos.dtype), head_dim, token_major=True)


def launch_forward(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float,
    offset: float, cast: Cast, head_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k, normalised and rotated."""
    q_out, k_out = _empty_out(q, q_weight, cos, cast, head_dim), _empty_out(k, k_weight, cos, cast, head_dim)
    shape = q.shape
    tokens, q_heads, k_heads, columns = shape[3 - head_dim], shape[head_dim], k.shape[head_dim], shape[3]
    block_columns = next_power_of_2(columns)
    block_q = _heads_at_once(q_heads, block_columns)
    if shape[0] * tokens:
        launch(
            _forward_kernel, (shape[0] * tokens,), q, k, q_out, k_out, q_weight, k_weight, cos, sin, tokens,
            *strides_of_heads(q, head_dim), *strides_of_heads(k, head_dim), *strides_of_angles(cos), eps,
            OFFSET=offset, LLAMA=cast == "llama", Q_HEADS=q_heads, K_HEADS=k_heads, COLUMNS=columns,
            ROTATED=cos.shape[2], BLOCK_Q=block_q, BLOCK_K=_heads_at_once(k_heads, block_columns),
            BLOCK_COLUMNS=block_columns, num_warps=max(block_q * block_columns // 1024, 1),
        )  # fmt: skip
    return q_out, k_out


Part = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""q or k in backward: dy, x, dx and the weight."""


def launch_backward(
    parts: list[Part], cos: Tensor, sin: Tensor, eps: float, offset: float, head_dim: int, needs_dw: bool
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
        block = _heads_at_once(count, block_columns)
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
            STAGES=min(3, 1 + min(100 * 2**10, shared_bytes(cos)) // max(waiting, 1)) if needs_dw else 1,
            PARTS=len(parts),
            num_warps=max(blocks[0] * block_columns // (256 if block_columns <= 128 else 512), 1),
        )  # fmt: skip
    if dw is None:
        return []
    return column_sums(dw, *(torch.float32 if weight is None else weight.dtype for _, _, _, weight in parts))
