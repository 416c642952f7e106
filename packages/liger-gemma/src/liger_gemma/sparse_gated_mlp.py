"""The MLP of Gemma 3n, some of whose layers keep only the largest values of their gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liger.layers import GatedMLP, gated


@dataclass(frozen=True)
class SparseGatedMLP(GatedMLP):
    """`GatedMLP` whose gate, where the module's `activation_sparsity` is above 0, passes its `_gaussian_topk` first."""

    def declines(self, module: Any) -> str | None:
        """Declines what `GatedMLP` declines, and an MLP that does not say how sparse it is or cannot make it so."""
        if not isinstance(getattr(module, "activation_sparsity", None), (int, float)):
            return "has no number activation_sparsity"
        if not callable(getattr(module, "_gaussian_topk", None)):
            return "has no method _gaussian_topk"
        return super().declines(module)

    def forward(self, module: Any, hidden_states: Tensor) -> Tensor:
        """`hidden_states` is (..., hidden size), and so is the result."""
        gate = module.gate_proj(hidden_states)
        if module.activation_sparsity > 0:
            gate = module._gaussian_topk(gate)
        return module.down_proj(gated(getattr(module, self.act_fn), gate, module.up_proj(hidden_states)))
