"""The layers that more than one family uses: which attribute feeds which op, and when to decline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.adapter import Kind, Layer
from liger.ops import geglu, rms_norm, swiglu
from liger.ops.rms_norm import Cast

__all__ = ["GatedMLP", "RMSNorm"]


@dataclass(frozen=True)
class RMSNorm(Layer):
    """A norm with a `weight`, or none, and an epsilon.

    Attributes:
        eps: the module's attribute that holds the epsilon.
        offset: added to the weight before it multiplies.
        cast: where the forward rounds: see `liger.ops.rms_norm`.
    """

    eps: str
    offset: float = 0.0
    cast: Cast = "llama"
    kind: ClassVar[Kind] = "norm"

    def declines(self, module: Any) -> str | None:
        """Declines a norm without that epsilon, or that holds anything but a weight."""
        if not isinstance(getattr(module, self.eps, None), float):
            return f"has no float attribute {self.eps!r}"
        unknown = {name for name, _ in module.named_parameters()} - {"weight"}
        return f"has parameters that RMSNorm does not know: {', '.join(sorted(unknown))}" if unknown else None

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """The normalised `x`, (..., N)."""
        weight = getattr(module, "weight", None)
        return rms_norm(x, weight, getattr(module, self.eps), offset=self.offset, cast=self.cast)


@dataclass(frozen=True)
class _Gate:
    """A gated activation's op, and the plain activation that it must equal."""

    op: Callable[[Tensor, Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]


_SWIGLU = _Gate(swiglu, F.silu)
_GATES = {
    "silu": _SWIGLU,
    "swish": _SWIGLU,
    "gelu_pytorch_tanh": _Gate(partial(geglu, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "gelu": _Gate(partial(geglu, approximate="none"), F.gelu),
}


@dataclass(frozen=True)
class GatedMLP(Layer):
    """`down(act(gate(x)) * up(x))`, with the activation and the product in one kernel.

    The three projections are called as modules, so whatever wraps them (LoRA, quantisation, FSDP) keeps working.

    Attributes:
        act: the config's attribute that names the activation.
        act_fn: the module's attribute that holds it.
    """

    act: str
    act_fn: str = "act_fn"
    kind: ClassVar[Kind] = "mlp"

    def declines(self, module: Any) -> str | None:
        """Declines an activation that has no kernel, and an MLP that holds anything else than the four it knows."""
        children = {name for name, _ in module.named_children()}
        expected = {"gate_proj", "up_proj", "down_proj"}
        if children - {self.act_fn} != expected:
            return f"holds {', '.join(sorted(children))}, not {', '.join(sorted(expected))}"
        name = getattr(module.config, self.act, None)
        gate = _GATES.get(name) if isinstance(name, str) else None
        if gate is None:
            return f"{self.act}={name!r} has no kernel (known: {', '.join(_GATES)})"
        # The module may hold another activation than its config says: ask it, at a few points.
        points = torch.linspace(-4, 4, 17, device="cpu")
        with torch.no_grad():
            same = torch.allclose(getattr(module, self.act_fn)(points), gate.activation(points), rtol=0, atol=1e-6)
        return None if same else f"its {self.act_fn} does not compute {name}"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """`x` is (..., hidden size), and so is the result."""
        gate = _GATES[getattr(module.config, self.act)].op
        return module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))
