"""The shapes of the models that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
"""Sizes that prove that a model trains, and nothing else."""


@dataclass(frozen=True)
class Shape:
    """A model of transformers, by its sizes."""

    title: str
    family: str
    """The transformers model package, which is also the ending of liger-kernel's function for it."""
    package: str
    """What ours needs installed."""
    config: dict[str, Any]
    attention: str = "sdpa"

    @property
    def parameters(self) -> int:
        """About how many weights the model has: those of its matrices."""
        sizes = self.config
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"] + sizes["num_key_value_heads"]
        attention = 2 * hidden * heads * self.head_dim
        layer = attention + 3 * hidden * sizes["intermediate_size"]
        tables = 1 if sizes["tie_word_embeddings"] else 2
        return int(sizes["num_hidden_layers"] * layer + tables * sizes["vocab_size"] * hidden)

    @property
    def head_dim(self) -> int:
        """The columns of one attention head."""
        sizes = self.config
        return int(sizes.get("head_dim") or sizes["hidden_size"] // sizes["num_attention_heads"])


_LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip

SHAPES = {
    "llama-1b": Shape(
        "Llama 1B shape (16 layers, H2048, V128256, tied)", "llama", "liger-llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": Shape("Llama-3-8B", "llama", "liger-llama", _LLAMA_3_8B),
    "llama-8b-8-layers": Shape(
        "8 layers of Llama-3-8B", "llama", "liger-llama", {**_LLAMA_3_8B, "num_hidden_layers": 8},
    ),
    "mistral-7b": Shape(
        "Mistral 7B shape", "mistral", "liger-mistral",
        {
            "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
            "sliding_window": None, "tie_word_embeddings": False,
        },
    ),
    "gemma2-2b": Shape(
        "Gemma2 2B shape", "gemma2", "liger-gemma",
        {
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        },
        attention="eager",
    ),
    "qwen3-1.7b": Shape(
        "Qwen3 1.7B shape", "qwen3", "liger-qwen",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-8b": Shape(
        "Qwen3 8B shape", "qwen3", "liger-qwen",
        {
            "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960,
            "tie_word_embeddings": False,
        },
    ),
    "phi3-mini": Shape(
        "Phi-3-mini shape", "phi3", "liger-phi",
        {
            "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 131072,
            "sliding_window": None, "pad_token_id": None, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip
