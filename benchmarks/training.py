"""A model in training, in each of the ways that are measured: bf16, fused AdamW, random weights, random tokens."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import TINY, Shape

Record = dict[str, Any]


def _compile(model: Any) -> None:
    # Each layer, not the whole: transformers, traced as a whole, makes a mask that keeps torch from flash attention.
    for layer in model.model.layers:
        layer.compile(fullgraph=True)


def _liger(model: Any) -> None:
    import liger

    liger.apply(model)


def _liger_compile(model: Any) -> None:
    _liger(model)
    _compile(model)


def _liger_recompute(model: Any) -> None:
    import liger

    liger.apply(model, recompute=True)


def _liger_kernel(model: Any) -> None:
    module = import_module("liger_kernel.transformers")
    getattr(module, f"apply_liger_kernel_to_{model.config.model_type}")(model=model)


WAYS: dict[str, Callable[[Any], None]] = {
    "eager": lambda model: None,
    "compile": _compile,
    "liger": _liger,
    "liger, recompute": _liger_recompute,
    "liger + compile": _liger_compile,
    "liger-kernel": _liger_kernel,
}
LAST = "liger-kernel"
"""It changes transformers for the rest of the process, so every model is trained in every other way before."""


def absent(shape: Shape, way: str) -> str | None:
    """The package that `way` needs and that is not installed."""
    needed = LAST if way == LAST else shape.package if way.startswith("liger") else None
    return needed if needed and find_spec(needed.replace("-", "_")) is None else None


@contextmanager
def _new_tensors(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _built(shape: Shape, device: torch.device, checkpointing: bool, tiny: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(shape.family, **{**shape.config, **(TINY if tiny else {})}, use_cache=False)
    torch.manual_seed(0)
    # Built in bf16 on the device; what a model wants in fp32 (the frequencies of its rotation) stays so.
    with _new_tensors(device, torch.bfloat16):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=shape.attention)
    built.train()
    if checkpointing:
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return built


class Training:
    """A model that takes training steps in one way, at any batch size and sequence length."""

    def __init__(self, shape: Shape, way: str, device: torch.device, *, checkpointing: bool, tiny: bool) -> None:
        self._device = device
        self._before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        self._model = _built(shape, device, checkpointing, tiny)
        WAYS[way](self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True)

    def tokens(self, batch: int, sequence: int) -> Tensor:
        """A batch."""
        return torch.randint(self._model.config.vocab_size, (batch, sequence), device=self._device)

    def _step(self, tokens: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._model(input_ids=tokens, labels=tokens).loss.backward()
        self._optimizer.step()

    def seconds(self, tokens: Tensor, steps: int) -> float:
        """Take `steps` steps. By the GPU's own clock, from before the first to after the last."""
        if self._device.type != "cuda":
            began = time.perf_counter()
            for _ in range(steps):
                self._step(tokens)
            return time.perf_counter() - began
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        first.record()
        for _ in range(steps):
            self._step(tokens)
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3

    def record(self, tokens: Tensor, steps: int) -> Record:
        """Tokens per second over `steps` steps, and the peak memory in GiB, the weights included."""
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = self.seconds(tokens, steps)
        peak = (torch.cuda.max_memory_allocated() - self._before) / 2**30 if on_gpu else None
        return {"tokens_per_second": steps * tokens.numel() / seconds, "peak_gib": peak}

    def recover(self) -> None:
        """Give back what a step that ran out of memory has left."""
        self._optimizer.zero_grad(set_to_none=True)
        forget(self._device)


def forget(device: torch.device) -> None:
    """Leave nothing behind, in torch.compile's caches, in cycles or in the allocator."""
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
