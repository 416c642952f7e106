"""Training steps of whole models: bf16, fused AdamW, random weights, random tokens.

`python -m benchmarks --op step --model llama-1b` runs one model, in every way that is measured for it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

Record = dict[str, Any]

WARM_UP, STEPS = 3, 6
"""Steps that do not count, and steps that do."""

TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
_BESIDE_A_PEER = ("eager", "liger", "liger-kernel")


@dataclass(frozen=True)
class Model:
    """A model's shape and how it is trained."""

    title: str
    family: str
    """The transformers model package, which is also the ending of liger-kernel's function for it."""
    package: str
    """What ours needs installed."""
    config: dict[str, Any]
    batch: int
    sequence: int
    checkpointing: bool = True
    attention: str = "sdpa"
    ways: tuple[str, ...] = _BESIDE_A_PEER
    """The ways that a run without `--peer` takes."""
    gib: int = 75
    """Memory of the GPU below which a run without `--model` leaves it out."""


MODELS = {
    "llama-1b": Model(
        "Llama 1B shape (16 layers, H2048, V128256, tied), 4×4096", "llama", "liger-llama",
        {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "head_dim": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        batch=4, sequence=4096, checkpointing=False,
        ways=("eager", "compile", "liger", "liger, recompute", "liger + compile", "liger-kernel"),
    ),
    "llama-8b-8-layers": Model(
        "8 layers of Llama-3-8B, 4×4096, checkpointing", "llama", "liger-llama",
        {**_LLAMA_3_8B, "num_hidden_layers": 8}, batch=4, sequence=4096,
    ),
    "qwen3-1.7b": Model(
        "Qwen3 1.7B shape, 2×4096, checkpointing", "qwen3", "liger-qwen",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
            "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
        batch=2, sequence=4096,
    ),
    "gemma2-2b": Model(
        "Gemma2 2B shape, 1×4096, checkpointing, eager attention", "gemma2", "liger-gemma",
        {
            "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
            "head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 8192,
            "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
        },
        batch=1, sequence=4096, attention="eager",
    ),
    "llama-8b": Model(
        "Llama-3-8B, all 32 layers, 4×4096, checkpointing", "llama", "liger-llama", _LLAMA_3_8B, batch=4,
        sequence=4096, gib=130,
    ),
    "llama-8b-16k": Model(
        "Llama-3-8B, 1×16384, checkpointing", "llama", "liger-llama", _LLAMA_3_8B, batch=1, sequence=16384, gib=130,
    ),
}  # fmt: skip


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


@contextmanager
def _new_tensors(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _built(model: Model, device: torch.device, tiny: bool) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.family, **{**model.config, **(TINY if tiny else {})}, use_cache=False)
    torch.manual_seed(0)
    # Built in bf16 on the device; what a model wants in fp32 (the frequencies of its rotation) stays so.
    with _new_tensors(device, torch.bfloat16):
        built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=model.attention)
    built.train()
    if model.checkpointing:
        built.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return built


def _seconds(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """By the GPU's own clock, from before the first step to after the last."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(steps):
            step()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    for _ in range(steps):
        step()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def training_step(model: Model, way: str, device: torch.device, tiny: bool) -> Record:
    """Tokens per second over a few steps after those that are not counted, and the peak memory in GiB."""
    before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    built = _built(model, device, tiny)
    WAYS[way](built)
    optimizer = torch.optim.AdamW(built.parameters(), lr=1e-5, fused=True)
    shape = (2, 32) if tiny else (model.batch, model.sequence)
    tokens = torch.randint(built.config.vocab_size, shape, device=device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        built(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    for _ in range(1 if tiny else WARM_UP):
        step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    steps = 2 if tiny else STEPS
    seconds = _seconds(step, steps, device)
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if device.type == "cuda" else None
    return {"tokens_per_second": steps * tokens.numel() / seconds, "peak_gib": peak}


def _missing(model: Model, way: str) -> str | None:
    needed = LAST if way == LAST else model.package if way.startswith("liger") else None
    return needed if needed and find_spec(needed.replace("-", "_")) is None else None


def _attempt(model: Model, way: str, device: torch.device, tiny: bool) -> Record:
    missing = _missing(model, way)
    if missing:
        return {"not_installed": missing}
    try:
        return training_step(model, way, device, tiny)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _forget(device: torch.device) -> None:
    """Leave no model behind, in torch.compile's caches or in cycles."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _selected(names: list[str] | None, device: torch.device) -> list[str]:
    if names:
        return names
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30 if device.type == "cuda" else 0
    return [name for name, model in MODELS.items() if device.type != "cuda" or model.gib <= gib]


def _line(name: str, way: str, record: Record) -> str:
    if "tokens_per_second" not in record:
        return f"step  {name:<18} {way:<16} {record}"
    peak = "" if record["peak_gib"] is None else f"  peak {record['peak_gib']:.1f} GiB"
    return f"step  {name:<18} {way:<16} {record['tokens_per_second']:,.0f} tokens/s{peak}"


def training_steps(
    device: torch.device,
    names: list[str] | None = None,
    peers: list[str] | None = None,
    tiny: bool = False,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Every model and way that was asked for; one that fails is recorded with its error, an absent one by its name."""
    chosen = _selected(names, device)
    results = {name: {"title": MODELS[name].title, "ways": {}} for name in chosen}
    planned = [
        (name, way)
        for name in chosen
        for way in WAYS
        if (way in peers if peers else way in MODELS[name].ways)
    ]  # fmt: skip
    for name, way in sorted(planned, key=lambda plan: plan[1] == LAST):
        record = _attempt(MODELS[name], way, device, tiny)
        results[name]["ways"][way] = record  # type: ignore[index]
        _forget(device)
        print(_line(name, way, record), flush=True)
        save(results)
    return results
