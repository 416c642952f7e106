"""A rotary embedding whose results have the dtype of q and k, whatever the dtype of cos and sin."""

from __future__ import annotations

from torch import Tensor

from liger.ops import rotary


def rotary_in_own_dtype(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`liger.ops.rotary`, rounded to the dtypes of q and k, as a model with cos and sin in fp32 does."""
    q_rotated, k_rotated = rotary(q, k, cos, sin, unsqueeze_dim)
    return q_rotated.to(q.dtype), k_rotated.to(k.dtype)
