"""How q, k, cos and sin lie in memory: what rotary and qk_norm_rotary read where it lies, and what they allocate.

`head_dim` is the dimension of the heads in q and k, 1 or 2; that of the tokens is the other one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_shapes(op: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> None:
    """Raise, in the name of `op`, unless q, k, cos and sin fit each other."""
    q_shape, k_shape, cos_shape, token_dim = q.shape, k.shape, cos.shape, 3 - head_dim
    if len(q_shape) != 4:
        raise ValueError(f"{op}: q has shape {tuple(q_shape)}, expected 4 dimensions")
    as_q = (q_shape[0], q_shape[token_dim], q_shape[3])
    if len(k_shape) != 4 or (k_shape[0], k_shape[token_dim], k_shape[3]) != as_q:
        raise ValueError(
            f"{op}: k has shape {tuple(k_shape)}, expected q's {tuple(q_shape)} but for dimension {head_dim}"
        )
    if len(cos_shape) != 3 or cos_shape[0] not in (1, q_shape[0]) or cos_shape[1] != q_shape[token_dim]:
        raise ValueError(
            f"{op}: cos has shape {tuple(cos_shape)}, expected ({q_shape[0]} or 1, {q_shape[token_dim]}, R)"
        )
    if cos_shape[2] % 2 or not 0 < cos_shape[2] <= q_shape[3]:
        raise ValueError(f"{op}: cos has {cos_shape[2]} columns, expected an even number up to q's {q_shape[3]}")
    if sin.shape != cos_shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin.shape)}, expected cos's {tuple(cos_shape)}")


def empty_heads(like: Tensor, dtype: torch.dtype, head_dim: int, token_major: bool) -> Tensor:
    """An empty tensor of the shape of `like`, its heads side by side in memory (`token_major`) or its tokens."""
    shape = like.shape
    heads, tokens, columns = shape[head_dim], shape[3 - head_dim], shape[3]
    head, token = (columns, heads * columns) if token_major else (tokens * columns, columns)
    inner = (head, token, 1) if head_dim == 1 else (token, head, 1)
    return like.new_empty_strided(shape, (heads * tokens * columns, *inner), dtype=dtype)


def is_token_major(x: Tensor, head_dim: int) -> bool:
    """Whether the heads of a token lie side by side, not the tokens of a head."""
    strides = x.stride()
    return strides[3 - head_dim] >= strides[head_dim]


def with_contiguous_columns(x: Tensor) -> Tensor:
    """`x`, or a copy where its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def readable_angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, or copies where their columns are not contiguous or their strides differ."""
    strides = cos.stride()
    return (cos, sin) if strides[2] == 1 and strides == sin.stride() else (cos.contiguous(), sin.contiguous())


def strides_of_heads(x: Tensor, head_dim: int) -> tuple[int, int, int]:
    """The strides of batch, tokens and heads."""
    strides = x.stride()
    return strides[0], strides[3 - head_dim], strides[head_dim]


def strides_of_angles(cos: Tensor) -> tuple[int, int]:
    """The strides of batch and tokens."""
    strides = cos.stride()
    return strides[0] if cos.shape[0] > 1 else 0, strides[1]
