"""The ops as modules, for a model of one's own: named, and their parameters named, as PyTorch and Hugging Face do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from liger.ops.cross_entropy import Reduction, cross_entropy
from liger.ops.geglu import Approximate, geglu
from liger.ops.layer_norm import layer_norm
from liger.ops.linear_cross_entropy import linear_cross_entropy
from liger.ops.rms_norm import Cast, rms_norm
from liger.ops.swiglu import swiglu

__all__ = ["GEGLU", "CrossEntropyLoss", "LayerNorm", "LinearCrossEntropyLoss", "RMSNorm", "SwiGLU"]


class RMSNorm(nn.Module):
    """`liger.ops.rms_norm` over the last dimension, with the weight as its parameter.

    Gemma's norm is `offset=1.0, cast="gemma"`. With that offset the weight starts at zeros, else at ones: the scale
    starts at 1 in both.
    """

    weight: nn.Parameter | None

    def __init__(
        self, normalized_shape: int, eps: float = 1e-6, *, elementwise_affine: bool = True, offset: float = 0.0,
        cast: Cast = "llama", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape, self.eps, self.offset = normalized_shape, eps, offset
        self.cast: Cast = cast
        weight = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the scale, offset + weight, to 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., N)."""
        return rms_norm(x, self.weight, self.eps, offset=self.offset, cast=self.cast)

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}, "
            f"offset={self.offset}, cast={self.cast!r}"
        )


class LayerNorm(nn.Module):
    """`liger.ops.layer_norm` over the last dimension, with weight and bias as its parameters."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, normalized_shape: int, eps: float = 1e-5, *, elementwise_affine: bool = True, bias: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.normalized_shape, self.eps = normalized_shape, eps
        for name, wanted in (("weight", elementwise_affine), ("bias", elementwise_affine and bias)):
            parameter = nn.Parameter(torch.empty(normalized_shape, device=device, dtype=dtype)) if wanted else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (..., N)."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        return (
            f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.weight is not None}, "
            f"bias={self.bias is not None}"
        )


class _GatedMLP(nn.Module):
    """down_proj(φ(gate_proj(x)) · up_proj(x)), named as in Llama; a subclass says φ."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = False,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """φ(gate) · up."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden_size) → (..., hidden_size)."""
        return self.down_proj(self.gate(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(_GatedMLP):
    """The MLP of Llama, Mistral, Qwen: down_proj(silu(gate_proj(x)) · up_proj(x))."""

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        return swiglu(gate, up)

    def extra_repr(self) -> str:
        """Which activation."""
        return "activation='silu'"


class GEGLU(_GatedMLP):
    """The MLP of Gemma: down_proj(gelu(gate_proj(x)) · up_proj(x)); gelu by tanh, unless `approximate="none"`."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, bias: bool = False, approximate: Approximate = "tanh",
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype)
        self.approximate: Approximate = approximate

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """gelu(gate) · up."""
        return geglu(gate, up, self.approximate)

    def extra_repr(self) -> str:
        """Which activation."""
        return f"activation='gelu', approximate={self.approximate!r}"


class _Loss(nn.Module):
    """The options that both losses share, those of `liger.ops.cross_entropy`."""

    def __init__(
        self, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, logit_scale: float,
        reduction: Reduction,
    ) -> None:  # fmt: skip
        super().__init__()
        self.ignore_index, self.label_smoothing, self.z_loss = ignore_index, label_smoothing, z_loss
        self.softcap, self.logit_scale = softcap, logit_scale
        self.reduction: Reduction = reduction

    def options(self) -> dict[str, Any]:
        """The keyword arguments for the op."""
        names = ("ignore_index", "label_smoothing", "z_loss", "softcap", "logit_scale", "reduction")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """The settings, as the constructor takes them."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


class CrossEntropyLoss(_Loss):
    """`liger.ops.cross_entropy` of logits and labels."""

    def __init__(
        self, *, ignore_index: int = -100, label_smoothing: float = 0.0, z_loss: float = 0.0,
        softcap: float | None = None, logit_scale: float = 1.0, reduction: Reduction = "mean",
    ) -> None:  # fmt: skip
        super().__init__(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction)

    def forward(self, logits: Tensor, target: Tensor, denominator: float | Tensor | None = None) -> Tensor:
        """The loss of (..., V) logits against (...) labels; a denominator replaces their number."""
        return cross_entropy(logits, target, denominator=denominator, **self.options())


class LinearCrossEntropyLoss(_Loss):
    """The head of a language model and its loss, `liger.ops.linear_cross_entropy`: logits never whole in memory.

    The head is `linear`, as in `torch.nn.LinearCrossEntropyLoss`: tie it with `loss.linear.weight = embedding.weight`.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, bias: bool = False, ignore_index: int = -100,
        label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float | None = None, logit_scale: float = 1.0,
        reduction: Reduction = "mean", device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__(ignore_index, label_smoothing, z_loss, softcap, logit_scale, reduction)
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)

    def forward(self, input: Tensor, target: Tensor, denominator: float | Tensor | None = None) -> Tensor:
        """The loss of (..., in_features) hidden states against (...) labels; a denominator replaces their number."""
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, denominator=denominator, **self.options()
        )
