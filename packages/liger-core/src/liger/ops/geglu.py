r"""GEGLU's elementwise part (Shazeer, 2020, https://arxiv.org/abs/2002.05202): gelu(gate) · up.

With Φ the normal distribution function and φ its density, for `approximate="none"`:

    y     = gate · Φ(gate) · up
    dgate = dy · up · (Φ(gate) + gate · φ(gate))        dup = dy · gate · Φ(gate)

and for "tanh" with Φ(x) ≈ s(x) = ½ · (1 + tanh(√(2/π) · (x + 0.044715 x³))), whose derivative stands in φ's place.

gate, up and y have one shape and dtype. All of it runs in fp32 and is rounded once; the kernels are in `gated`.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.ops.gated import Gated, JoinedGated, check, check_joined, readable
from liger.ops.launch import runs_kernels
from liger.ops.named import named

Approximate = Literal["tanh", "none"]

_GEGLU = named("geglu")(Gated)
_JoinedGEGLU = named("geglu_joined")(JoinedGated)


def reference(gate: Tensor, up: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """`geglu` in plain torch: the specification, and what devices without Triton run."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    return (F.gelu(gate.to(compute), approximate=approximate) * up.to(compute)).to(gate.dtype)


def geglu(gate: Tensor, up: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """Multiply `up` by gelu(`gate`).

    Args:
        gate: any shape, fp32, bf16, fp16 or fp64. Halves of one tensor (`x.chunk(2, -1)`) are read without a copy.
        up: gate's shape, dtype and device.
        approximate: "tanh" or "none", as in `torch.nn.functional.gelu`.

    Returns:
        A contiguous tensor of gate's shape and dtype.

    Raises:
        ValueError: `up` has another shape or device than `gate`, or `approximate` is unknown.
        TypeError: `gate` is not a floating-point tensor, or `up` has another dtype.
    """
    check("geglu", gate, up)
    _check_approximate("geglu", approximate)
    if runs_kernels(gate, up):
        return _GEGLU.apply(readable(gate), readable(up), "gelu_tanh" if approximate == "tanh" else "gelu")
    return reference(gate, up, approximate)


def geglu_joined(gate_up: Tensor, approximate: Approximate = "tanh") -> Tensor:
    """`geglu` of the two halves of the last dimension of `gate_up`, gate first, whose gradient is one tensor as well.

    Args:
        gate_up: (..., 2N), fp32, bf16, fp16 or fp64.
        approximate: "tanh" or "none", as in `torch.nn.functional.gelu`.

    Returns:
        A contiguous tensor (..., N) of its dtype.

    Raises:
        ValueError: the last dimension of `gate_up` is odd, or `approximate` is unknown.
        TypeError: `gate_up` is not a floating-point tensor.
    """
    check_joined("geglu_joined", gate_up)
    _check_approximate("geglu_joined", approximate)
    if runs_kernels(gate_up):
        return _JoinedGEGLU.apply(readable(gate_up), "gelu_tanh" if approximate == "tanh" else "gelu")
    gate, up = gate_up.chunk(2, dim=-1)
    return reference(gate, up, approximate)


def _check_approximate(op: str, approximate: str) -> None:
    if approximate not in ("tanh", "none"):
        raise ValueError(f"{op}: approximate must be 'tanh' or 'none', not {approximate!r}")
