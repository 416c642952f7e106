r"""SwiGLU's elementwise part (Shazeer, 2020, https://arxiv.org/abs/2002.05202): silu(gate) · up.

    σ     = 1 / (1 + exp(−gate))
    y     = gate · σ · up
    dgate = dy · up · σ · (1 + gate · (1 − σ))        dup = dy · gate · σ

gate, up and y have one shape and dtype. All of it runs in fp32 and is rounded once; the kernels are in `gated`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.ops.gated import Gated, JoinedGated, check, check_joined, readable
from liger.ops.launch import runs_kernels
from liger.ops.named import named

_SwiGLU = named("swiglu")(Gated)
_JoinedSwiGLU = named("swiglu_joined")(JoinedGated)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain torch: the specification, and what devices without Triton run."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(compute)) * up.to(compute)).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Multiply `up` by silu(`gate`).

    Args:
        gate: any shape, fp32, bf16, fp16 or fp64. Halves of one tensor (`x.chunk(2, -1)`) are read without a copy.
        up: gate's shape, dtype and device.

    Returns:
        A contiguous tensor of gate's shape and dtype.

    Raises:
        ValueError: `up` has another shape or device than `gate`.
        TypeError: `gate` is not a floating-point tensor, or `up` has another dtype.
    """
    check("swiglu", gate, up)
    if runs_kernels(gate, up):
        return _SwiGLU.apply(readable(gate), readable(up), "silu")
    return reference(gate, up)


def swiglu_joined(gate_up: Tensor) -> Tensor:
    """`swiglu` of the two halves of the last dimension of `gate_up`, gate first, whose gradient is one tensor as well.

    Args:
        gate_up: (..., 2N), fp32, bf16, fp16 or fp64.

    Returns:
        A contiguous tensor (..., N) of its dtype.

    Raises:
        ValueError: the last dimension of `gate_up` is odd.
        TypeError: `gate_up` is not a floating-point tensor.
    """
    check_joined("swiglu_joined", gate_up)
    if runs_kernels(gate_up):
        return _JoinedSwiGLU.apply(readable(gate_up), "silu")
    gate, up = gate_up.chunk(2, dim=-1)
    return reference(gate, up)
