"""The rotary embedding as transformers writes it."""

from __future__ import annotations

import torch


def rotated(x, cos, sin):
    """`apply_rotary_pos_emb` for one tensor (Phi3's, which rotates in part; Llama's when cos is as wide as x)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat((-high, low), dim=-1) * sin, rest], dim=-1)
