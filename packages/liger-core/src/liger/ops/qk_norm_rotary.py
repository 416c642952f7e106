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

q and k may have any strides. The results have their shapes, and lie in memory as (B, S, H, D), the heads of a token
side by side. That is how projections write q and k and read their gradients, and how attention reads them, torch's as a
transposed view and FlashAttention as they are: nothing is copied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from liger.ops.constant import constant
from liger.ops.heads import check_shapes, empty_heads, readable_angles, with_contiguous_columns
from liger.ops.launch import runs_kernels
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.qk_norm_rotary_kernels import MAX_COLUMNS, Part, launch_backward, launch_forward
from liger.ops.rms_norm import Cast
from liger.ops.rms_norm import reference as reference_norm
from liger.ops.rotary import reference as reference_rotary


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


@named("qk_norm_rotary")
class _QKNormRotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
        eps: float, offset: float, cast: Cast, head_dim: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.offset, ctx.head_dim = eps, offset, head_dim
        return launch_forward(q, k, q_weight, k_weight, cos, sin, eps, offset, cast, head_dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor | None, dk_out: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        needs_dq, needs_dk, needs_dq_weight, needs_dk_weight = ctx.needs_input_grad[:4]
        dq = dk = dq_weight = dk_weight = None
        parts: list[Part] = []
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
            sums = launch_backward(parts, cos, sin, ctx.eps, ctx.offset, ctx.head_dim, needs_dw)
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
        ValueError: a shape or device is not as above, `cast` is unknown, or `eps` or `offset` requires a gradient.
        TypeError: a tensor is not floating-point, k has another dtype than q, or sin than cos.
    """
    _check(q, k, q_weight, k_weight, cos, sin, cast, unsqueeze_dim)
    eps, offset = constant("qk_norm_rotary", "eps", eps), constant("qk_norm_rotary", "offset", offset)
    trains_angles = (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled()
    on_kernels = runs_kernels(q, k, q_weight, k_weight, cos, sin)
    if on_kernels and not trains_angles and 0 < q.shape[3] <= MAX_COLUMNS:
        q, k = with_contiguous_columns(q), with_contiguous_columns(k)
        q_weight = None if q_weight is None else q_weight.contiguous()
        k_weight = None if k_weight is None else k_weight.contiguous()
        cos, sin = readable_angles(cos, sin)
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
