"""One training step of a LLaMA of 1B parameters: bf16, fused AdamW, random weights, random tokens."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def _eager(model: Any) -> None:
    del model


def _compile(model: Any) -> None:
    model.compile()


def _liger(model: Any) -> None:
    import liger

    liger.apply(model)


def _liger_compile(model: Any) -> None:
    _liger(model)
    model.compile()


def _liger_kernel(model: Any) -> None:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(model=model)


WAYS: dict[str, Callable[[Any], None]] = {
    "eager": _eager,
    "compile": _compile,
    "liger": _liger,
    "liger + compile": _liger_compile,
    "liger-kernel": _liger_kernel,  # the last: it changes transformers for the rest of the process
}


def training_step(way: str, device: torch.device, batch: int, sequence: int, tiny: bool, steps: int) -> dict[str, Any]:
    """Tokens per second over `steps` steps after three that are not counted, and the peak memory in GiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(TINY if tiny else SHAPE), use_cache=False)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).to(torch.bfloat16).train()
    WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(config.vocab_size, (batch, sequence), device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {"tokens_per_second": steps * tokens.numel() / seconds, "peak_gib": peak}


def training_steps(device: torch.device, ways: list[str], tiny: bool, steps: int) -> dict[str, dict[str, Any]]:
    """Every way of training that was asked for; one that fails is recorded with its error."""
    batch, sequence = (2, 32) if tiny else (4, 4096)
    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        if way == "liger-kernel" and find_spec("liger_kernel") is None:
            continue
        torch._dynamo.reset()
        try:
            results[way] = training_step(way, device, batch, sequence, tiny, steps)
        except Exception as error:
            results[way] = {"failed": f"{type(error).__name__}: {error}"[:500]}
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"step  {way:<16} {results[way]}", flush=True)
    return results
