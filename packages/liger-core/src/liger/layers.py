"""The layers that more than one family uses: which attribute feeds which op, and when to decline.

Over 300 lines: adapters may rely on `liger.layers`, so that the layers stay in one file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger.adapter import Kind, Layer
from liger.autocast import autocast_dtype
from liger.known_code import HOOKS, HOOKS_ON_ALL, described, foreign_forward
from liger.ops import geglu, geglu_joined, layer_norm, rms_norm, swiglu, swiglu_joined
from liger.ops.geglu import Approximate
from liger.ops.launch import runs_kernels
from liger.ops.rms_norm import Cast
from liger.recompute import rebuildable

__all__ = ["Experts", "FusedGatedMLP", "Gated", "GatedMLP", "LayerNorm", "RMSNorm", "Stock", "gated"]


@dataclass(frozen=True)
class Stock(Layer):
    """No kernel: the module's own code runs, and the report says why.

    Attributes:
        kind: what is not replaced.
        reason: why not.
    """

    kind: Kind  # type: ignore[misc]
    reason: str

    def declines(self, module: Any) -> str | None:
        """Always, with the reason."""
        return self.reason

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """Never called."""
        raise NotImplementedError(self.reason)


@dataclass(frozen=True)
class _Norm(Layer):
    """What the norms share: the attribute of the epsilon, and that they know every parameter of their module."""

    eps: str = "eps"
    kind: ClassVar[Kind] = "norm"
    parameters: ClassVar[set[str]]

    def declines(self, module: Any) -> str | None:
        """Declines a norm without that epsilon, over several dimensions, or with other parameters."""
        if not isinstance(getattr(module, self.eps, None), float):
            return f"has no float attribute {self.eps!r}"
        shape = getattr(module, "normalized_shape", None)
        if shape is not None and len(shape) != 1:
            return f"normalises over {len(shape)} dimensions"
        weight = getattr(module, "weight", None)
        if weight is not None and (weight.dim() == 0 or weight.shape == (1,)):
            return "its weight is one number for all columns"
        unknown = {name for name, _ in module.named_parameters()} - self.parameters
        if unknown:
            return f"has parameters that {type(self).__name__} does not know: {', '.join(sorted(unknown))}"
        return None


@dataclass(frozen=True)
class RMSNorm(_Norm):
    """A norm with a `weight`, or none, and an epsilon.

    Attributes:
        eps: the module's attribute that holds the epsilon.
        offset: added to the weight before it multiplies.
        cast: where the forward rounds: see `liger.ops.rms_norm`.
    """

    offset: float = 0.0
    cast: Cast = "llama"
    parameters: ClassVar[set[str]] = {"weight"}

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """The normalised `x`, (..., N)."""
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.RMSNorm):
            x = _as_torch_takes_it(F.rms_norm, x)
        return rebuildable(rms_norm, x, weight, getattr(module, self.eps), offset=self.offset, cast=self.cast)

    def kernel(self, module: Any) -> str:
        """Always the same."""
        return "rms_norm"


@dataclass(frozen=True)
class LayerNorm(_Norm):
    """`torch.nn.LayerNorm` over one dimension, with weight and bias, one of them, or neither.

    Attributes:
        eps: the module's attribute that holds the epsilon.
    """

    parameters: ClassVar[set[str]] = {"weight", "bias"}

    def forward(self, module: Any, input: Tensor) -> Tensor:
        """The normalised `input`, (..., N)."""
        input = _as_torch_takes_it(F.layer_norm, input)
        return rebuildable(layer_norm, input, module.weight, module.bias, getattr(module, self.eps))

    def kernel(self, module: Any) -> str:
        """Always the same."""
        return "layer_norm"


def _as_torch_takes_it(norm: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`x` in the dtype in which torch's own norm takes it under autocast: on a GPU in fp32, and returns that."""
    return x if autocast_dtype(x.device) is None else x.to(norm(x.new_empty(0, 1), (1,)).dtype)


@dataclass(frozen=True)
class _Gate:
    """A gated activation's op, of two tensors and of one that joins them, and the activation that it must equal."""

    name: str
    op: Callable[[Tensor, Tensor], Tensor]
    joined: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]


def _geglu(approximate: Approximate) -> _Gate:
    ops = partial(geglu, approximate=approximate), partial(geglu_joined, approximate=approximate)
    return _Gate("geglu", *ops, partial(F.gelu, approximate=approximate))


_SWIGLU, _GEGLU_TANH, _GEGLU = _Gate("swiglu", swiglu, swiglu_joined, F.silu), _geglu("tanh"), _geglu("none")
_GATES = {"silu": _SWIGLU, "swish": _SWIGLU, "gelu_pytorch_tanh": _GEGLU_TANH, "gelu": _GEGLU}
_GATE_OF_CLASS = {
    ("torch.nn.modules.activation", "SiLU"): _SWIGLU,
    ("transformers.activations", "SiLUActivation"): _SWIGLU,
    ("transformers.activations", "GELUTanh"): _GEGLU_TANH,
    ("transformers.activations", "GELUActivation"): _GEGLU,
}
"""By the class of the activation object, because a module may later hold another than its config names."""


def _is_replaced(act_fn: Any) -> bool:
    return isinstance(act_fn, nn.Module) and "forward" in vars(act_fn)


def _gate_of(act_fn: Any) -> _Gate | None:
    """The kernels of an activation; None where it must be called itself."""
    if _is_replaced(act_fn) or any(HOOKS_ON_ALL) or any(getattr(act_fn, hooks, None) for hooks in HOOKS):
        return None
    found = _gate_of_class(act_fn)
    if found is None or torch.compiler.is_compiling():
        return found
    return None if foreign_forward(type(act_fn)) else found


def _gate_of_class(act_fn: Any) -> _Gate | None:
    return _GATE_OF_CLASS.get((type(act_fn).__module__, type(act_fn).__name__))


def _computes(act_fn: Callable[[Tensor], Tensor], activation: Callable[[Tensor], Tensor]) -> bool:
    points = torch.linspace(-4, 4, 17, device="cpu")
    with torch.no_grad():
        return torch.allclose(act_fn(points), activation(points), rtol=0, atol=1e-6)


def gated(act_fn: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """`act_fn(gate) * up`, in one kernel where the activation that a module holds now has one.

    An adapter of PEFT's on one of the two may leave them with different dtypes under autocast.
    """
    found = _gate_of(act_fn)
    return act_fn(gate) * up if found is None or gate.dtype != up.dtype else rebuildable(found.op, gate, up)


@dataclass(frozen=True)
class Gated(Layer):
    """What gated layers share, those of a family's own too: the activation that the config names, and what holds it.

    Attributes:
        act: the config's attribute that names the activation. None, where the module has no config: the activation
            that it holds says by its class which one it is.
        act_fn: the module's attribute that holds it.
    """

    act: str | None
    act_fn: str = "act_fn"

    def kernel(self, module: Any) -> str:
        """The op of the activation."""
        _, gate = self._named(module)
        return gate.name if gate is not None else super().kernel(module)

    def _named(self, module: Any) -> tuple[Any, _Gate | None]:
        """What the activation is called, by the config or by its class, and the kernels of that."""
        if self.act is None:
            act_fn = getattr(module, self.act_fn, None)
            return type(act_fn).__name__, _gate_of_class(act_fn)
        name = getattr(getattr(module, "config", None), self.act, None)
        return name, _GATES.get(name) if isinstance(name, str) else None

    def activation_declines(self, module: Any) -> str | None:
        """Why the activation has no kernel, is not the one that the config names, or is none to be left out."""
        name, gate = self._named(module)
        if gate is None and self.act is not None:
            return f"{self.act}={name!r} has no kernel (known: {', '.join(_GATES)})"
        act_fn = getattr(module, self.act_fn, None)
        if act_fn is None:
            return f"has no {self.act_fn}"
        if any(getattr(act_fn, hooks, None) for hooks in HOOKS):
            return f"a hook on its {self.act_fn} wants to be called"
        if _is_replaced(act_fn):
            return f"its {self.act_fn}.forward was replaced on the instance by {described(vars(act_fn)['forward'])}"
        replaced = foreign_forward(type(act_fn)) if _gate_of_class(act_fn) else None
        if replaced:
            return f"of its {self.act_fn} {replaced}"
        # The module may hold another activation than its config or its class says: ask it, at a few points.
        if gate is not None and not _computes(act_fn, gate.activation):
            return f"its {self.act_fn} does not compute {name}"
        known = gate is not None and _gate_of_class(act_fn) is gate
        return None if known else f"its {self.act_fn} is a {type(act_fn).__name__}, which has no kernel"

    def _children_decline(self, module: Any, expected: set[str]) -> str | None:
        """Why the module's children are not the expected ones and perhaps the activation."""
        children = {name for name, _ in module.named_children()}
        if children - {self.act_fn} == expected:
            return None
        return f"holds {', '.join(sorted(children))}, not {', '.join(sorted(expected))}"

    def _gate_joined(self, module: Any, gate_up: Tensor) -> Tensor:
        act_fn = getattr(module, self.act_fn)
        found = _gate_of(act_fn)
        if found is not None and runs_kernels(gate_up):
            return rebuildable(found.joined, gate_up)
        # The reference keeps the halves, and only from what an op keeps can its output be computed again.
        return gated(act_fn, *gate_up.chunk(2, dim=-1))


@dataclass(frozen=True)
class GatedMLP(Gated):
    """`down(act(gate(x)) * up(x))`, with the activation and the product in one kernel.

    The three projections are called as modules, so whatever wraps them (LoRA, quantisation, FSDP) keeps working.

    Attributes:
        dropout: the module's child that is applied before `down`, if it has one.
    """

    dropout: str | None = None
    kind: ClassVar[Kind] = "mlp"

    def declines(self, module: Any) -> str | None:
        """Declines an activation that has no kernel, and an MLP that holds anything else than what it knows."""
        expected = {"gate_proj", "up_proj", "down_proj"} | ({self.dropout} if self.dropout else set())
        return self._children_decline(module, expected) or self.activation_declines(module)

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """`x` is (..., hidden size), and so is the result."""
        hidden = gated(getattr(module, self.act_fn), module.gate_proj(x), module.up_proj(x))
        return module.down_proj(getattr(module, self.dropout)(hidden) if self.dropout else hidden)


@dataclass(frozen=True)
class FusedGatedMLP(Gated):
    """`GatedMLP` whose `gate_up_proj` computes gate and up at once: its first half is the gate."""

    act_fn: str = "activation_fn"
    kind: ClassVar[Kind] = "mlp"

    def declines(self, module: Any) -> str | None:
        """Declines an activation that has no kernel, and an MLP that holds anything else than the three it knows."""
        return self._children_decline(module, {"gate_up_proj", "down_proj"}) or self.activation_declines(module)

    def forward(self, module: Any, x: Tensor) -> Tensor:
        """`x` is (..., hidden size), and so is the result."""
        return module.down_proj(self._gate_joined(module, module.gate_up_proj(x)))


_GATED_DISPATCH = ("grouped_mm", "batched_mm", "deepgemm")


@dataclass(frozen=True)
class Experts(Gated):
    """The gated activation of a mixture of experts, between the two products of transformers' own dispatch.

    It stands for `_apply_gate` of a class made by `transformers.integrations.moe.use_experts_implementation`: gate and
    up are the halves of one tensor and are read where they lie. Router, routing weights and products are not touched.
    """

    kind: ClassVar[Kind] = "experts"
    method: ClassVar[str] = "_apply_gate"

    def declines(self, module: Any) -> str | None:
        """Declines experts that do not gate as `use_experts_implementation` does, or whose dispatch does it inline."""
        from transformers.integrations import moe

        if getattr(type(module), self.method, None) is not moe._default_apply_gate:
            return f"its {self.method} is not the one of transformers.integrations.moe"
        if not module.has_gate or not module.is_concatenated:
            return "its experts have no gate" if not module.has_gate else "its gate and up are interleaved"
        dispatch = module.config._experts_implementation
        if dispatch not in _GATED_DISPATCH:
            return f"experts_implementation={dispatch!r} does not call {self.method} ({', '.join(_GATED_DISPATCH)} do)"
        return self.activation_declines(module)

    def forward(self, module: Any, gate_up_out: Tensor) -> Tensor:
        """`gate_up_out` is (tokens, 2 · width), the result (tokens, width)."""
        return self._gate_joined(module, gate_up_out)
