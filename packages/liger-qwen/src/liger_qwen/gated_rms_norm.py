"""The norm of a linear attention's output, multiplied by an activated gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from liger.layers import RMSNorm
from liger.ops import rms_norm, swiglu


@dataclass(frozen=True)
class GatedRMSNorm(RMSNorm):
    """`silu(gate) * rms_norm(hidden_states)`: two kernels, that keep their inputs and no fp32 copy of them.

    The norm rounds twice, as the stock module does; silu and its product with the norm run in fp32 and round once.
    """

    eps: str = "variance_epsilon"

    def declines(self, module: Any) -> str | None:
        """Declines as `RMSNorm`, and an activation that is not SiLU."""
        activation = getattr(module, "activation", None)
        if activation not in ("silu", "swish"):
            return f"activation={activation!r} has no kernel (known: silu, swish)"
        return super().declines(module)

    def kernel(self, module: Any) -> str:
        """Both."""
        return "rms_norm, swiglu"

    def forward(self, module: Any, hidden_states: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """Both are (rows, N), and so is the result, in the dtype of `hidden_states`."""
        normed = rms_norm(hidden_states, module.weight, getattr(module, self.eps), offset=self.offset, cast=self.cast)
        return swiglu(gate.to(normed.dtype), normed).to(hidden_states.dtype)
