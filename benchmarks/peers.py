"""Who is measured: for each op what transformers does, that under torch.compile, liger-kernel, and ours.

A peer is a function that returns the function to measure, so that a package is imported when its turn comes: one that
is not installed is left out by name, and one that fails does so where it is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Any]
NAMES = ("eager", "compile", "liger-kernel", "liger")


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * x32.to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return _rms_norm(residual, weight), residual


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def rotate_half(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), dim=-1)

    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def _qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    # The model normalises before it transposes.
    q, k = _rms_norm(q.transpose(1, 2), q_weight), _rms_norm(k.transpose(1, 2), k_weight)
    return _rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(input, linear_weight).float(), target)


def _op(name: str, **options: Any) -> Callable[[], Peer]:
    def load() -> Peer:
        function = getattr(import_module("liger.ops"), name)
        return lambda **inputs: function(**inputs, **options)

    return load


def _liger_kernel(name: str, call: Callable[[Peer], Peer]) -> Callable[[], Peer]:
    return lambda: call(getattr(import_module("liger_kernel.transformers.functional"), name))


def _liger_kernel_qk_norm_rotary() -> Peer:
    """Its norm twice, then its rotation: what its users run, as it has no op for both."""
    functional = import_module("liger_kernel.transformers.functional")

    def call(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q = functional.liger_rms_norm(q.transpose(1, 2), q_weight, 1e-6).transpose(1, 2)
        k = functional.liger_rms_norm(k.transpose(1, 2), k_weight, 1e-6).transpose(1, 2)
        return functional.liger_rope(q, k, cos, sin)

    return call


def _peers(eager: Peer, ours: Callable[[], Peer], liger_kernel: Callable[[], Peer]) -> dict[str, Callable[[], Peer]]:
    return {
        "eager": lambda: eager,
        "compile": lambda: torch.compile(eager, dynamic=False),
        "liger-kernel": liger_kernel,
        "liger": ours,
    }


RMS_NORM = _peers(
    _rms_norm,
    _op("rms_norm", eps=1e-6),
    _liger_kernel("liger_rms_norm", lambda f: lambda x, weight: f(x, weight, 1e-6)),
)
ADD_RMS_NORM = _peers(
    _add_rms_norm,
    _op("add_rms_norm", eps=1e-6),
    _liger_kernel("liger_fused_add_rms_norm", lambda f: lambda x, residual, weight: f(x, residual, weight, 1e-6)),
)
LAYER_NORM = _peers(
    _layer_norm,
    _op("layer_norm", eps=1e-5),
    _liger_kernel("liger_layer_norm", lambda f: lambda x, weight, bias: f(x, weight, bias, 1e-5)),
)
SWIGLU = _peers(_swiglu, _op("swiglu"), _liger_kernel("liger_swiglu", lambda f: lambda gate, up: f(gate, up)))
GEGLU = _peers(
    _geglu,
    _op("geglu", approximate="tanh"),
    _liger_kernel("liger_geglu", lambda f: lambda gate, up: f(gate, up)),
)
ROTARY = _peers(
    _rotary,
    _op("rotary"),
    _liger_kernel("liger_rope", lambda f: lambda q, k, cos, sin: f(q, k, cos, sin)),
)
QK_NORM_ROTARY = _peers(
    _qk_norm_rotary,
    _op("qk_norm_rotary", eps=1e-6, unsqueeze_dim=1),
    _liger_kernel_qk_norm_rotary,
)
CROSS_ENTROPY = _peers(
    _cross_entropy,
    _op("cross_entropy"),
    _liger_kernel("liger_cross_entropy", lambda f: lambda logits, target: f(logits, target)),
)
LINEAR_CROSS_ENTROPY = _peers(
    _linear_cross_entropy,
    _op("linear_cross_entropy"),
    _liger_kernel(
        "liger_fused_linear_cross_entropy",
        lambda f: lambda input, linear_weight, target: f(input, linear_weight, target),
    ),
)
