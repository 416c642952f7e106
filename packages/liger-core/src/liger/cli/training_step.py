"""What `python -m liger bench` measures of a model: a training step by transformers alone, and after `liger.apply`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.benchmark import Timer

import liger

FAMILIES = ("llama", "qwen3", "mistral", "phi3", "gemma")
"""The models of LLaMA's shape, the preferred first: that of the first adapter which is installed is trained."""


@dataclass(frozen=True)
class Setting:
    """A shape of model and batch, and the free GPU memory in GiB that training it as transformers does it needs."""

    title: str
    gib: float
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    sequence: int
    steps: int = 8

    def config(self) -> dict[str, Any]:
        """The arguments of a config of any of the families."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(self.sequence, 4096),
            "tie_word_embeddings": True,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "use_cache": False,
        }


SETTINGS = (
    Setting("1B", 40, 16, 2048, 8192, 32, 8, 128256, batch=2, sequence=4096),
    Setting("1B", 18, 16, 2048, 8192, 32, 8, 128256, batch=1, sequence=2048),
    Setting("250M", 8, 8, 1024, 4096, 16, 8, 128256, batch=1, sequence=2048),
    Setting("30M", 2, 4, 512, 2048, 8, 4, 32000, batch=1, sequence=1024),
)
"""The largest first."""

TINY = Setting("tiny", 0, 2, 32, 64, 4, 2, 99, batch=2, sequence=8, steps=1)


def family() -> str:
    """The first of FAMILIES that has an adapter.

    Raises:
        LookupError: none has.
    """
    installed = liger.adapters()
    found = next((key for key in FAMILIES if key in installed), None)
    if found is None:
        raise LookupError(f"none of the adapters that bench can train is installed: {', '.join(FAMILIES)}")
    return found


def training_step(model_type: str, setting: Setting, device: torch.device) -> dict[str, Any]:
    """One model in bf16 with fused AdamW: its steps first as transformers runs them, then after `liger.apply`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    config = AutoConfig.for_model(model_type, **setting.config())
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
        tokens = torch.randint(setting.vocabulary, (setting.batch, setting.sequence))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    stock = _measured(step, setting, device, held)
    patch = liger.apply(model)
    patched = _measured(step, setting, device, held)
    return {
        "model_type": model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": setting.batch,
        "sequence": setting.sequence,
        "swapped": len(patch.swapped),
        "ways": {"eager": stock, "liger": patched},
    }


def _measured(step: Callable[[], None], setting: Setting, device: torch.device, held: int) -> dict[str, float | None]:
    """Milliseconds a step, tokens per second, and the peak memory in GiB: weights, optimizer and all."""
    for _ in range(2):  # kernels are compiled, and the optimizer makes its state
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = Timer("step()", globals={"step": step}).timeit(setting.steps).mean
    peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30 if device.type == "cuda" else None
    return {
        "ms": seconds * 1e3,
        "tokens_per_second": setting.batch * setting.sequence / seconds,
        "peak_gib": peak,
    }
