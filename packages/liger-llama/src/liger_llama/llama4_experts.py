"""Llama 4's experts, which transformers computes without its experts dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from liger.adapter import Kind
from liger.layers import Gated, gated


@dataclass(frozen=True)
class Llama4Experts(Gated):
    """Every expert on every token, which its router's score has scaled before: two batched products, the gate between.

    The weights lie as (experts, in, out), and gate and up are the halves of one product, read where they lie.
    """

    act: str | None = None  # the module keeps no config to name it
    kind: ClassVar[Kind] = "experts"

    def declines(self, module: Any) -> str | None:
        """Declines other parameters than the two it knows, and an activation that has no kernel."""
        parameters = {name for name, _ in module.named_parameters()}
        if parameters != {"gate_up_proj", "down_proj"}:
            return f"holds {', '.join(sorted(parameters))}, not down_proj, gate_up_proj"
        return self.activation_declines(module)

    def forward(self, module: Any, hidden_states: Tensor) -> Tensor:
        """`hidden_states` is (experts · tokens, hidden size), and so is the result."""
        weight = module.gate_up_proj
        gate, up = torch.bmm(hidden_states.view(weight.shape[0], -1, weight.shape[1]), weight).chunk(2, dim=-1)
        return torch.bmm(gated(module.act_fn, gate, up), module.down_proj).view(-1, weight.shape[1])
