r"""What swiglu and geglu share: the kernels of out = φ(gate) · up, elementwise, for the activations φ of both.

    dgate = dout · up · φ'(gate)        dup = dout · φ(gate)

All in fp32, rounded once. Nothing but gate and up is kept: backward computes φ and φ' again, which costs no memory
traffic. The formulas of each φ stand in `swiglu` and `geglu`.

A contiguous tensor is one long row here. The two halves of one projection (Phi3's `gate_up.chunk(2, -1)`) are rows with
a stride, read where they lie. Given as one tensor, "joined", they get one gradient. Two would have to be put together
by autograd, which moves half as many bytes again.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from liger.ops.launch import jit, launch, next_power_of_2, tl
from liger.ops.once_differentiable import once_differentiable

Activation = Literal["silu", "gelu", "gelu_tanh"]

_BLOCK = 512  # elements a program handles: many small ones, since a thread's arithmetic lets its memory accesses wait
_ELEMENTS = 256  # of a warp: one access of 16 bytes per thread and tensor


@jit(varying=())
def _activate(x, ACTIVATION: tl.constexpr):
    """φ(x) and φ'(x)."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
        value = x * cdf
        derivative = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # ½ · (1 + tanh(u / 2)) = sigmoid(u), which overflows nowhere and is exact where tanh is near −1.
        u = x * (1.5957691216057308 + 0.07135481627260025 * x * x)
        e = tl.exp(-u)
        s = 1.0 / (1.0 + e)
        # 1 − s, whose digits a difference would lose where s is near 1; where s is 0, e may be infinite
        rest = tl.where(u < -80.0, 1.0, e * s)
        value = x * s
        derivative = s + value * rest * (1.5957691216057308 + 0.21406444881780076 * x * x)
    else:
        s = tl.sigmoid(x)
        value = x * s
        derivative = s + value * (1.0 - s)
    return value, derivative


@jit(varying=())
def _forward_block(gate, up, out, column, columns, ACTIVATION: tl.constexpr, MASKED: tl.constexpr):
    inside = column < columns if MASKED else None
    value, _ = _activate(tl.load(gate + column, mask=inside).to(tl.float32), ACTIVATION)
    product = value * tl.load(up + column, mask=inside).to(tl.float32)
    tl.store(out + column, product.to(out.dtype.element_ty), mask=inside)


@jit(varying=())
def _backward_block(
    dout, gate, up, dgate, dup, column, columns, ACTIVATION: tl.constexpr, NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    inside = column < columns if MASKED else None
    g = tl.load(dout + column, mask=inside).to(tl.float32)
    value, derivative = _activate(tl.load(gate + column, mask=inside).to(tl.float32), ACTIVATION)
    if NEEDS_DGATE:
        u = tl.load(up + column, mask=inside).to(tl.float32)
        tl.store(dgate + column, (g * u * derivative).to(dgate.dtype.element_ty), mask=inside)
    if NEEDS_DUP:
        tl.store(dup + column, (g * value).to(dup.dtype.element_ty), mask=inside)


@jit(varying=("columns",))
def _forward_kernel(
    gate, up, out, columns, gate_stride, up_stride, out_stride, ACTIVATION: tl.constexpr, JOINED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    blocks = (columns - 1) // BLOCK + 1  # tl.cdiv would overflow just below 2³¹ columns
    row = block // blocks
    first = (block - row * blocks) * BLOCK
    column = first + tl.arange(0, BLOCK)
    gate += row * gate_stride
    out += row * out_stride
    if JOINED:
        up = gate + out_stride
    else:
        up += row * up_stride
    # Only the last block of a row is masked: a mask with a bound that Triton knows nothing about forbids wide accesses.
    if first + BLOCK <= columns:
        _forward_block(gate, up, out, column, columns, ACTIVATION, MASKED=False)
    else:
        _forward_block(gate, up, out, column, columns, ACTIVATION, MASKED=True)


@jit(varying=("columns",))
def _backward_kernel(
    dout, gate, up, dgate, dup, columns, gate_stride, up_stride, out_stride, gradient_stride,
    ACTIVATION: tl.constexpr, JOINED: tl.constexpr, NEEDS_DGATE: tl.constexpr, NEEDS_DUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    blocks = (columns - 1) // BLOCK + 1  # tl.cdiv would overflow just below 2³¹ columns
    row = block // blocks
    first = (block - row * blocks) * BLOCK
    column = first + tl.arange(0, BLOCK)
    dout += row * out_stride
    gate += row * gate_stride
    if NEEDS_DGATE:
        dgate += row * gradient_stride
    if JOINED:
        up = gate + out_stride
        dup = dgate + out_stride
    else:
        up += row * up_stride
        if NEEDS_DUP:
            dup += row * gradient_stride
    if first + BLOCK <= columns:
        _backward_block(dout, gate, up, dgate, dup, column, columns, ACTIVATION, NEEDS_DGATE, NEEDS_DUP, MASKED=False)
    else:
        _backward_block(dout, gate, up, dgate, dup, column, columns, ACTIVATION, NEEDS_DGATE, NEEDS_DUP, MASKED=True)


def _row_stride(x: Tensor) -> int | None:
    """The stride between the rows of `x` when each is contiguous and all lie equally far apart, else None."""
    if x.is_contiguous():
        return x.shape[-1]
    if x.stride(-1) != 1:
        return None
    row_stride, expected = x.shape[-1], None
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if expected is None:
            row_stride = stride
        elif stride != expected:
            return None
        expected = stride * size
    return row_stride


def readable(x: Tensor) -> Tensor:
    """`x` as the kernels can read it: copied only when a single row stride cannot describe it."""
    return x if x.is_contiguous() or _row_stride(x) is not None else x.contiguous()


def _layout(gate: Tensor, up: Tensor | None) -> tuple[int, int, int, int, int, int, int]:
    """(programs, elements of a block, columns, strides of the rows of gate, up, out and the gradients) of a launch.

    Without `up`, `gate` joins the two. What a launch writes is contiguous.
    """
    if up is not None and gate.is_contiguous() and up.is_contiguous():
        n = gate.numel()
        return -(-n // _BLOCK), _BLOCK, n, 0, 0, 0, 0
    width = gate.shape[-1]
    columns = width if up is not None else width // 2
    block = min(_BLOCK, next_power_of_2(columns))
    gate_stride, up_stride = _row_stride(gate), 0 if up is None else _row_stride(up)
    assert gate_stride is not None
    assert up_stride is not None
    return gate.numel() // width * -(-columns // block), block, columns, gate_stride, up_stride, columns, width


def _launch_forward(gate: Tensor, up: Tensor | None, out: Tensor, activation: Activation) -> None:
    if out.numel():
        programs, block, *columns_and_strides, _ = _layout(gate, up)
        launch(
            _forward_kernel, (programs,), gate, up, out, *columns_and_strides,
            ACTIVATION=activation, JOINED=up is None, BLOCK=block, num_warps=max(block // _ELEMENTS, 1),
        )  # fmt: skip


def _launch_backward(
    dout: Tensor, gate: Tensor, up: Tensor | None, dgate: Tensor | None, dup: Tensor | None, activation: Activation
) -> None:
    if dout.numel():
        programs, block, *columns_and_strides = _layout(gate, up)
        launch(
            _backward_kernel, (programs,), dout, gate, up, dgate, dup, *columns_and_strides,
            ACTIVATION=activation, JOINED=up is None, NEEDS_DGATE=dgate is not None,
            NEEDS_DUP=dup is not None or up is None, BLOCK=block, num_warps=max(block // _ELEMENTS, 1),
        )  # fmt: skip


class Gated(torch.autograd.Function):
    """φ(gate) · up through the kernels: `Gated.apply(readable(gate), readable(up), activation)`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """Launch the forward kernel and keep gate and up."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        _launch_forward(gate, up, out, activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Launch the backward kernel for those of gate and up that need a gradient."""
        gate, up = ctx.saved_tensors
        dout = dout.contiguous()
        dgate = torch.empty_like(dout) if ctx.needs_input_grad[0] else None
        dup = torch.empty_like(dout) if ctx.needs_input_grad[1] else None
        _launch_backward(dout, gate, up, dgate, dup, ctx.activation)
        return dgate, dup, None


class JoinedGated(torch.autograd.Function):
    """φ(gate) · up of one tensor (…, 2N), gate first: `JoinedGated.apply(readable(gate_up), activation)`."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: Activation) -> Tensor:
        """Launch the forward kernel and keep gate_up."""
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
        _launch_forward(gate_up, None, out, activation)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Launch the backward kernel: both halves' gradients are one tensor."""
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up, memory_format=torch.contiguous_format)
        _launch_backward(dout.contiguous(), gate_up, None, gradient, None, ctx.activation)
        return gradient, None


def check(op: str, gate: Tensor, up: Tensor) -> None:
    """Raise, naming what was given, unless gate and up are floating-point twins."""
    if not gate.is_floating_point():
        raise TypeError(f"{op}: gate must have a floating-point dtype, not {gate.dtype}")
    if up.dtype != gate.dtype:
        raise TypeError(f"{op}: up has dtype {up.dtype}, expected gate's {gate.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"{op}: up has shape {tuple(up.shape)}, expected gate's {tuple(gate.shape)}")
    if up.device != gate.device:
        raise ValueError(f"{op}: up is on {up.device}, expected gate's device {gate.device}")


def check_joined(op: str, gate_up: Tensor) -> None:
    """Raise, naming what was given, unless gate_up is floating-point and its last dimension has two halves."""
    if not gate_up.is_floating_point():
        raise TypeError(f"{op}: gate_up must have a floating-point dtype, not {gate_up.dtype}")
    if not gate_up.dim() or gate_up.shape[-1] % 2:
        raise ValueError(f"{op}: gate_up has shape {tuple(gate_up.shape)}, expected an even last dimension")
