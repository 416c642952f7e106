"""Mistral 4's rotary embedding, whose pairs lie side by side on the way in and half a head apart on the way out."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from liger.ops import rotary


def rotary_pairs(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """`rotary` of q and k whose columns 2i and 2i+1 are a pair: it becomes columns i and i + R/2.

    Args:
        q: (B, Hq, S, R), or (B, S, Hq, R) with `unsqueeze_dim=2`.
        k: as q, with Hk heads.
        cos: (B, S, R) or (1, S, R), of two equal halves, as Mistral 4's own module makes it.
        sin: cos's shape and dtype, of two equal halves.
        position_ids: not read, as in the model's function.
        unsqueeze_dim: the dimension of the heads.

    Returns:
        q and k rotated, as `rotary` returns them.
    """
    return rotary(_halves(q), _halves(k), cos, sin, unsqueeze_dim)


def _halves(x: Tensor) -> Tensor:
    """The even columns, then the odd ones: one copy."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
