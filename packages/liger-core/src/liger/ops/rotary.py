r"""Rotary position embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864), rotate-half convention.

Of q and k at once (`rotary`), or of one of them (`rotary_one`).

cos and sin have R ≤ D columns; with h = R/2, for each head of each token and i < h:

    y[i]      = x[i] · cos[i] − x[i+h] · sin[i]               dx[i]   = dy[i] · cos[i] + dy[i+h] · sin[i+h]
    y[i+h]    = x[i+h] · cos[i+h] + x[i] · sin[i+h]           dx[i+h] = dy[i+h] · cos[i+h] − dy[i] · sin[i]
    y[R:]     = x[R:]                                         dx[R:]  = dy[R:]

Backward is the transpose of forward, for any cos and sin: of another norm than 1, with halves that differ. It is the
forward with (−sin[i+h], −sin[i]) in place of (sin[i], sin[i+h]), so one kernel does both.

All of it runs in fp32 and is rounded once: y to the promoted dtype of x and cos, dx to x's dtype. Only cos and sin are
kept. q and k are read where they lie, whatever their strides, and y has their memory layout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger.ops.heads import (
    check_shapes,
    empty_heads,
    is_token_major,
    readable_angles,
    strides_of_angles,
    strides_of_heads,
    with_contiguous_columns,
)
from liger.ops.launch import jit, launch, next_power_of_2, runs_kernels, tl
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable


def reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """`rotary` in plain torch: the specification, and what devices without Triton run."""
    return _rotated(q, cos, sin, unsqueeze_dim), _rotated(k, cos, sin, unsqueeze_dim)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, cos.dtype)
    compute = torch.promote_types(dtype, torch.float32)
    cos, sin = cos.to(compute).unsqueeze(unsqueeze_dim), sin.to(compute).unsqueeze(unsqueeze_dim)
    x, rest = x[..., : cos.shape[-1]].to(compute), x[..., cos.shape[-1] :]
    low, high = x.chunk(2, dim=-1)
    y = (x * cos + torch.cat((-high, low), dim=-1) * sin).to(dtype)
    return torch.cat((y, rest.to(dtype)), dim=-1) if rest.shape[-1] else y


@jit(varying=())
def _rotate_heads(
    x, y, x_head_stride, y_head_stride, cos_low, cos_high, sin_low, sin_high,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Write the heads of one token at `x`, rotated, to `y`."""
    column = tl.arange(0, BLOCK_HALF)
    for first in tl.static_range(0, HEADS, BLOCK_HEADS):
        head = first + tl.arange(0, BLOCK_HEADS).to(tl.int64)
        inside = (head < HEADS)[:, None] & (column < HALF)[None, :]
        x_at = x + head[:, None] * x_head_stride
        y_at = y + head[:, None] * y_head_stride
        low = tl.load(x_at + column[None, :], mask=inside, other=0.0).to(tl.float32)
        high = tl.load(x_at + HALF + column[None, :], mask=inside, other=0.0).to(tl.float32)
        y_low = low * cos_low[None, :] - high * sin_low[None, :]
        y_high = high * cos_high[None, :] + low * sin_high[None, :]
        tl.store(y_at + column[None, :], y_low.to(y.dtype.element_ty), mask=inside)
        tl.store(y_at + HALF + column[None, :], y_high.to(y.dtype.element_ty), mask=inside)
        if REST > 0:
            rest = tl.arange(0, BLOCK_REST)
            inside = (head < HEADS)[:, None] & (rest < REST)[None, :]
            kept = tl.load(x_at + 2 * HALF + rest[None, :], mask=inside, other=0.0)
            tl.store(y_at + 2 * HALF + rest[None, :], kept.to(y.dtype.element_ty), mask=inside)


@jit(varying=("tokens",))
def _rotate_kernel(
    q, q_out, k, k_out, cos, sin, tokens,
    q_batch_stride, q_token_stride, q_head_stride, q_out_batch_stride, q_out_token_stride, q_out_head_stride,
    k_batch_stride, k_token_stride, k_head_stride, k_out_batch_stride, k_out_token_stride, k_out_head_stride,
    cos_batch_stride, cos_token_stride,
    TRANSPOSED: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch = program // tokens
    token = program - batch * tokens

    column = tl.arange(0, BLOCK_HALF)
    inside = column < HALF
    cos += batch * cos_batch_stride + token * cos_token_stride
    sin += batch * cos_batch_stride + token * cos_token_stride
    cos_low = tl.load(cos + column, mask=inside, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + HALF + column, mask=inside, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + column, mask=inside, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + HALF + column, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        sin_low, sin_high = -sin_high, -sin_low

    q += batch * q_batch_stride + token * q_token_stride
    q_out += batch * q_out_batch_stride + token * q_out_token_stride
    _rotate_heads(
        q, q_out, q_head_stride, q_out_head_stride, cos_low, cos_high, sin_low, sin_high,
        Q_HEADS, HALF, REST, BLOCK_Q, BLOCK_HALF, BLOCK_REST,
    )  # fmt: skip
    if K_HEADS > 0:
        k += batch * k_batch_stride + token * k_token_stride
        k_out += batch * k_out_batch_stride + token * k_out_token_stride
        _rotate_heads(
            k, k_out, k_head_stride, k_out_head_stride, cos_low, cos_high, sin_low, sin_high,
            K_HEADS, HALF, REST, BLOCK_K, BLOCK_HALF, BLOCK_REST,
        )  # fmt: skip


def _tile(block_half: int) -> tuple[int, int]:
    """Elements of each half that a program rotates at once, and those of a warp; more heads than that go in turns."""
    return (2048, 512) if block_half <= 64 else (1024, 128)


def _launch(
    q: Tensor, q_out: Tensor, k: Tensor | None, k_out: Tensor | None, cos: Tensor, sin: Tensor, head_dim: int,
    transposed: bool,
) -> None:  # fmt: skip
    """Rotate q into q_out and k into k_out, or one tensor alone."""
    shape = q.shape
    tokens, q_heads, k_heads = shape[3 - head_dim], shape[head_dim], 0 if k is None else k.shape[head_dim]
    if not shape[0] * tokens:
        return
    half = cos.shape[-1] // 2
    rest = shape[3] - 2 * half
    block_half = next_power_of_2(half)
    at_once, of_a_warp = _tile(block_half)
    most_heads = max(1, at_once // block_half)
    block_q = min(next_power_of_2(max(q_heads, 1)), most_heads)
    k_strides: tuple[int, ...] = (0,) * 6
    if k is not None and k_out is not None:
        k_strides = strides_of_heads(k, head_dim) + strides_of_heads(k_out, head_dim)
    launch(
        _rotate_kernel, (shape[0] * tokens,), q, q_out, k, k_out, cos, sin, tokens,
        *strides_of_heads(q, head_dim), *strides_of_heads(q_out, head_dim), *k_strides, *strides_of_angles(cos),
        TRANSPOSED=transposed, Q_HEADS=q_heads, K_HEADS=k_heads, HALF=half, REST=rest,
        BLOCK_Q=block_q, BLOCK_K=min(next_power_of_2(max(k_heads, 1)), most_heads), BLOCK_HALF=block_half,
        BLOCK_REST=next_power_of_2(max(rest, 1)),
        num_warps=min(max(block_q * block_half // of_a_warp, 1), 8),
    )  # fmt: skip


@named("rotary")
class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        q, k = with_contiguous_columns(q), with_contiguous_columns(k)
        cos, sin = readable_angles(cos, sin)
        dtype = torch.promote_types(q.dtype, cos.dtype)
        ctx.q_token_major, ctx.k_token_major = is_token_major(q, head_dim), is_token_major(k, head_dim)
        q_out = empty_heads(q, dtype, head_dim, ctx.q_token_major)
        k_out = empty_heads(k, dtype, head_dim, ctx.k_token_major)
        _launch(q, q_out, k, k_out, cos, sin, head_dim, transposed=False)
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.head_dim = q.dtype, head_dim
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        needs_dq, needs_dk = ctx.needs_input_grad[:2]
        dq = dk = None
        if needs_dq:
            dq_out = with_contiguous_columns(dq_out)
            dq = empty_heads(dq_out, ctx.dtype, ctx.head_dim, ctx.q_token_major)
        if needs_dk:
            dk_out = with_contiguous_columns(dk_out)
            dk = empty_heads(dk_out, ctx.dtype, ctx.head_dim, ctx.k_token_major)
        if dq is not None:
            _launch(dq_out, dq, dk_out if needs_dk else None, dk, cos, sin, ctx.head_dim, transposed=True)
        elif dk is not None:
            _launch(dk_out, dk, None, None, cos, sin, ctx.head_dim, transposed=True)
        return dq, dk, None, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Rotate the first R columns of every head of `q` and `k` by the angles of their tokens; pass on the others.

    Args:
        q: (B, Hq, S, D), or (B, S, Hq, D) with `unsqueeze_dim=2`; fp32, bf16, fp16 or fp64, any strides.
        k: as q, with Hk heads. Its dtype may be another, as an adapter of PEFT's on one of the projections leaves it
            under autocast.
        cos: (B, S, R) or (1, S, R) with R even and at most D; any floating-point dtype, on q's device.
        sin: cos's shape and dtype.
        unsqueeze_dim: the dimension of the heads.

    Returns:
        q and k rotated, each in its promoted dtype with cos, new tensors with the memory layout of q and k.

    Raises:
        ValueError: a shape or device is not as above.
        TypeError: a tensor is not floating-point, or sin has another dtype than cos.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    if k.dtype != q.dtype:
        return rotary_one(q, cos, sin, unsqueeze_dim), rotary_one(k, cos, sin, unsqueeze_dim)
    trains_angles = (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled()
    if runs_kernels(q, k, cos, sin) and not trains_angles:
        return _Rotary.apply(q, k, cos, sin, unsqueeze_dim)
    return reference(q, k, cos, sin, unsqueeze_dim)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    if head_dim not in (1, 2):
        raise ValueError(f"rotary: unsqueeze_dim must be 1 or 2, not {head_dim!r}")
    for name, t in (("q", q), ("k", k), ("cos", cos)):
        if not t.is_floating_point():
            raise TypeError(f"rotary: {name} must have a floating-point dtype, not {t.dtype}")
    if sin.dtype != cos.dtype:
        raise TypeError(f"rotary: sin has dtype {sin.dtype}, expected cos's {cos.dtype}")
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(
            f"rotary: k, cos and sin are on {k.device}, {cos.device} and {sin.device}, expected q's device {q.device}"
        )
    check_shapes("rotary", q, k, cos, sin, head_dim)


@named("rotary_one")
class _RotaryOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
        x = with_contiguous_columns(x)
        cos, sin = readable_angles(cos, sin)
        ctx.token_major = is_token_major(x, head_dim)
        y = empty_heads(x, torch.promote_types(x.dtype, cos.dtype), head_dim, ctx.token_major)
        _launch(x, y, None, None, cos, sin, head_dim, transposed=False)
        ctx.save_for_backward(cos, sin)
        ctx.dtype, ctx.head_dim = x.dtype, head_dim
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dout = with_contiguous_columns(dout)
        dx = empty_heads(dout, ctx.dtype, ctx.head_dim, ctx.token_major)
        cos, sin = ctx.saved_tensors
        _launch(dout, dx, None, None, cos, sin, ctx.head_dim, transposed=True)
        return dx, None, None, None


def rotary_one(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
    """`rotary` of one tensor, q or k alone.

    Args:
        x: (B, H, S, D), or (B, S, H, D) with `unsqueeze_dim=2`; fp32, bf16, fp16 or fp64, any strides.
        cos: (B, S, R) or (1, S, R) with R even and at most D; any floating-point dtype, on x's device.
        sin: cos's shape and dtype.
        unsqueeze_dim: the dimension of the heads.

    Returns:
        x rotated, in the promoted dtype of x and cos, a new tensor with the memory layout of x.

    Raises:
        ValueError, TypeError: as `rotary`, which calls x q.
    """
    _check(x, x, cos, sin, unsqueeze_dim)
    trains_angles = (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled()
    if runs_kernels(x, cos, sin) and not trains_angles:
        return _RotaryOne.apply(x, cos, sin, unsqueeze_dim)
    return _rotated(x, cos, sin, unsqueeze_dim)
