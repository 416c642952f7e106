"""Tiny random models and batches: what a contract test runs on, on a CPU, in milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TINY: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
"""Config values that every family understands, odd on purpose: vocabulary, hidden and intermediate sizes are no powers
of two, and head_dim is not hidden_size / num_attention_heads."""


def build(cls: type[nn.Module], config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Any:
    """A model whose every parameter is random, so that none hides a term by being 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cls(config)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model.to(device=device, dtype=dtype).train()


def batch(vocab_size: int, device: torch.device, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Input ids, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (rows, length), generator=generator, device="cpu")
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator, device="cpu") < 0.25, -100)
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
