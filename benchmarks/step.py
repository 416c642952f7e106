"""Training steps of whole models: bf16, fused AdamW, random weights, random tokens.

`python -m benchmarks --op step --model llama-1b` runs one model, in every way that is measured for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.models import SHAPES, Shape
from benchmarks.training import LAST, WAYS, Record, Training, absent, forget

WARM_UP, STEPS = 3, 6
"""Steps that do not count, and steps that do."""

_BESIDE_A_PEER = ("eager", "liger", "liger-kernel")


@dataclass(frozen=True)
class Model:
    """A shape and how it is trained."""

    shape: Shape
    batch: int
    sequence: int
    checkpointing: bool = True
    ways: tuple[str, ...] = _BESIDE_A_PEER
    """The ways that a run without `--peer` takes."""
    gib: int = 75
    """Memory of the GPU below which a run without `--model` leaves it out."""

    @property
    def title(self) -> str:
        """What the table shows."""
        notes = [self.shape.title, f"{self.batch}×{self.sequence}"]
        notes += ["checkpointing"] if self.checkpointing else []
        notes += [f"{self.shape.attention} attention"] if self.shape.attention != "sdpa" else []
        return ", ".join(notes)


MODELS = {
    "llama-1b": Model(
        SHAPES["llama-1b"], batch=4, sequence=4096, checkpointing=False,
        ways=("eager", "compile", "liger", "liger, recompute", "liger + compile", "liger-kernel"),
    ),
    "llama-8b-8-layers": Model(SHAPES["llama-8b-8-layers"], batch=4, sequence=4096),
    "qwen3-1.7b": Model(SHAPES["qwen3-1.7b"], batch=2, sequence=4096),
    "gemma2-2b": Model(SHAPES["gemma2-2b"], batch=1, sequence=4096),
    "llama-8b": Model(SHAPES["llama-8b"], batch=4, sequence=4096, gib=130),
    "llama-8b-16k": Model(SHAPES["llama-8b"], batch=1, sequence=16384, gib=130),
}  # fmt: skip


def training_step(model: Model, way: str, device: torch.device, tiny: bool) -> Record:
    """Tokens per second over a few steps after those that are not counted, and the peak memory in GiB."""
    training = Training(model.shape, way, device, checkpointing=model.checkpointing, tiny=tiny)
    tokens = training.tokens(*(2, 32) if tiny else (model.batch, model.sequence))
    training.seconds(tokens, 1 if tiny else WARM_UP)
    return training.record(tokens, 2 if tiny else STEPS)


def _attempt(model: Model, way: str, device: torch.device, tiny: bool) -> Record:
    missing = absent(model.shape, way)
    if missing:
        return {"not_installed": missing}
    try:
        return training_step(model, way, device, tiny)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}


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
        forget(device)
        print(_line(name, way, record), flush=True)
        save(results)
    return results
