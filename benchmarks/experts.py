"""The activation of a mixture of experts: transformers' experts as they are, and after `liger.apply`.

One layer's experts, with its `grouped_mm` dispatch, at the shapes of Mixtral and Qwen3-30B-A3B. `python -m benchmarks
--op experts` measures them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import gpu_ms, peak_mib, wall_ms

Record = dict[str, Any]

STOCK, OURS = "grouped_mm", "grouped_mm + liger"
ROUNDS = 2
"""How often the two take turns: each figure is the lower one."""


@dataclass(frozen=True)
class Experts:
    """The experts of one layer, and the tokens that reach them."""

    title: str
    family: str
    cls: str
    package: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int

    @property
    def config(self) -> dict[str, Any]:
        """What the class reads, under the names that its family has for it."""
        many = "num_local_experts" if self.family == "mixtral" else "num_experts"
        width = "intermediate_size" if self.family == "mixtral" else "moe_intermediate_size"
        return {"hidden_size": self.hidden, width: self.intermediate, many: self.experts, "hidden_act": "silu"}

    @property
    def shape(self) -> str:
        """The sizes as text."""
        sizes = f"{self.experts} experts, top {self.top_k}, H{self.hidden}, I{self.intermediate}"
        return f"{sizes}, {self.tokens} tokens"


def _mixtral(tokens: int) -> Experts:
    return Experts("Mixtral", "mixtral", "MixtralExperts", "liger-mistral", 4096, 14336, 8, 2, tokens)


def _qwen3(tokens: int) -> Experts:
    return Experts("Qwen3-30B-A3B", "qwen3_moe", "Qwen3MoeExperts", "liger-qwen", 2048, 768, 128, 8, tokens)


LAYERS = (_mixtral(4096), _mixtral(8192), _qwen3(4096), _qwen3(8192))
TINY = (
    Experts("Mixtral", "mixtral", "MixtralExperts", "liger-mistral", 64, 96, 4, 2, 32),
    Experts("Qwen3-30B-A3B", "qwen3_moe", "Qwen3MoeExperts", "liger-qwen", 64, 32, 8, 4, 32),
)


def _built(layer: Experts, device: torch.device) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(layer.family, **layer.config)
    config._experts_implementation = "grouped_mm"
    modeling = import_module(f"transformers.models.{layer.family}.modeling_{layer.family}")
    with device:
        module = getattr(modeling, layer.cls)(config).to(torch.bfloat16)
    with torch.no_grad():
        module.gate_up_proj.normal_(std=layer.hidden**-0.5)
        module.down_proj.normal_(std=layer.intermediate**-0.5)
    return module


def _random(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(torch.bfloat16)


class _Layer:
    """The experts with their inputs: what is called."""

    def __init__(self, layer: Experts, device: torch.device) -> None:
        torch.manual_seed(0)
        self.module = _built(layer, device)
        self.hidden = _random(layer.tokens, layer.hidden, device=device).requires_grad_()
        scores = torch.randn(layer.tokens, layer.experts, device=device).softmax(-1)
        weights, self.index = scores.topk(layer.top_k, dim=-1)
        self.weights = (weights / weights.sum(-1, keepdim=True)).to(torch.bfloat16).requires_grad_()
        self.upstream = _random(layer.tokens, layer.hidden, device=device)
        self.gate_up = _random(layer.tokens * layer.top_k, 2 * layer.intermediate, device=device).requires_grad_()
        self.gate_upstream = _random(layer.tokens * layer.top_k, layer.intermediate, device=device)

    def both(self) -> tuple[Tensor, ...]:
        """Forward and backward: the output and every gradient."""
        output = self.module(self.hidden, self.index, self.weights)
        inputs = (self.hidden, self.weights, *self.module.parameters())
        return (output, *torch.autograd.grad(output, inputs, self.upstream))

    def gate(self) -> tuple[Tensor, ...]:
        """The activation alone, on as many rows as reach the experts."""
        output = self.module._apply_gate(self.gate_up)
        return torch.autograd.grad(output, self.gate_up, self.gate_upstream)


def _figures(layer: _Layer, device: torch.device) -> Record:
    on_gpu = device.type == "cuda"
    return {
        "gpu_ms": gpu_ms(layer.both) if on_gpu else None,
        "gate_ms": gpu_ms(layer.gate) if on_gpu else None,
        "wall_ms": wall_ms(layer.both, device),
        "peak_mib": peak_mib(layer.both) if on_gpu else None,
    }


def _lower(first: Record | None, second: Record) -> Record:
    if first is None:
        return second
    return {key: value if value is None else min(first[key], value) for key, value in second.items()}


def _difference(ours: tuple[Tensor, ...], stock: tuple[Tensor, ...]) -> float:
    """The largest ‖ours − stock‖ / ‖stock‖ of the output and the gradients: two roundings of the same formulas."""
    pairs = ((a.detach().float(), b.detach().float()) for a, b in zip(ours, stock, strict=True))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measure_experts(layer: Experts, device: torch.device) -> dict[str, Any]:
    """One layer's figures with the stock activation and with ours, in turns on the same module."""
    import liger

    made = _Layer(layer, device)
    stock = made.both()
    records: dict[str, Record] = {}
    for turn in range(ROUNDS):
        records[STOCK] = _lower(records.get(STOCK), _figures(made, device))
        with liger.apply(made.module, experts=True):  # raises where it would change nothing
            if turn == 0:
                difference = _difference(made.both(), stock)
                del stock
            records[OURS] = _lower(records.get(OURS), _figures(made, device))
    return {**records, "difference": difference}


def _say(layer: Experts, measured: dict[str, Any]) -> None:
    for name, record in measured.items():
        if isinstance(record, dict):
            figures = ("gpu_ms", "gate_ms", "wall_ms", "peak_mib")
            shown = "  ".join(f"{key} {record[key]:,.3f}" for key in figures if record[key] is not None)
            print(f"experts  {layer.title:<14} {layer.shape:<48} {name:<19} {shown}", flush=True)
    if "difference" not in measured:
        print(f"experts  {layer.title:<14} {layer.shape:<48} {measured}", flush=True)


def all_experts(
    device: torch.device, tiny: bool = False, save: Callable[[list[Any]], None] = lambda results: None
) -> list[dict[str, Any]]:
    """Every layer; one that fails is recorded with its error, a package that is not installed by its name."""
    results: list[dict[str, Any]] = []
    for layer in TINY if tiny else LAYERS:
        if find_spec(layer.package.replace("-", "_")) is None:
            measured: dict[str, Any] = {"not_installed": layer.package}
        else:
            try:
                measured = measure_experts(layer, device)
            except Exception as error:
                measured = {"failed": f"{type(error).__name__}: {error}"[:500]}
        _say(layer, measured)
        results.append({"model": layer.title, "shape": layer.shape, **measured})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        save(results)
    return results
