"""What `python -m liger bench` measures of the ops: each beside what a model runs without it, at a few shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from liger import ops

Sizes = tuple[int, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class OpCase:
    """An op and its stock counterpart, which take the same tensors in the same order.

    Attributes:
        op: its name in `liger.ops`.
        inputs: makes the tensors of some sizes on the current device; those with gradients are differentiated.
        stock: what eager PyTorch runs, and torch.compile compiles.
        liger: the op.
        shapes: the sizes that are measured.
        tiny: sizes that a CPU, or Triton's interpreter, takes no time for.
    """

    op: str
    inputs: Callable[..., list[Tensor]]
    stock: Function
    liger: Function
    shapes: tuple[Sizes, ...]
    tiny: Sizes


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16).requires_grad_()


def _norm_inputs(rows: int, columns: int) -> list[Tensor]:
    return [_random(rows, columns), _random(columns)]


def _added_inputs(rows: int, columns: int) -> list[Tensor]:
    return [_random(rows, columns), *_norm_inputs(rows, columns)]


def _layer_norm_inputs(rows: int, columns: int) -> list[Tensor]:
    return [*_norm_inputs(rows, columns), _random(columns)]


def _gated_inputs(rows: int, columns: int) -> list[Tensor]:
    return [_random(rows, columns), _random(rows, columns)]


def _rotary_inputs(sequence: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    # As a model makes them: (batch, sequence, heads, dim) in memory, seen as (batch, heads, sequence, dim).
    q, k = (_random(1, sequence, n, dim).detach().transpose(1, 2).requires_grad_() for n in (heads, kv_heads))
    angle = torch.randn(1, sequence, dim // 2).repeat(1, 1, 2)
    return [q, k, angle.cos().bfloat16(), angle.sin().bfloat16()]


def _qk_norm_rotary_inputs(sequence: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    q, k, cos, sin = _rotary_inputs(sequence, heads, kv_heads, dim)
    return [q, k, _random(dim), _random(dim), cos, sin]


def _logit_inputs(rows: int, vocabulary: int) -> list[Tensor]:
    return [_random(rows, vocabulary), torch.randint(vocabulary, (rows,))]


def _head_inputs(rows: int, hidden: int, vocabulary: int) -> list[Tensor]:
    weight = (_random(vocabulary, hidden).detach() * hidden**-0.5).requires_grad_()
    return [_random(rows, hidden), weight, torch.randint(vocabulary, (rows,))]


def _distilled_inputs(rows: int, hidden: int, vocabulary: int) -> list[Tensor]:
    student, teacher = (_head_inputs(rows, hidden, vocabulary)[:2] for _ in range(2))
    return [*student, *(tensor.detach() for tensor in teacher)]


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight), total


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), -1) * sin.unsqueeze(1)


def _rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    return _rotary(_rms_norm(q, q_weight), _rms_norm(k, k_weight), cos, sin)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target)


def _linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _cross_entropy(F.linear(input, weight), target)


def _log_probs(input: Tensor, weight: Tensor) -> Tensor:
    return F.log_softmax(F.linear(input, weight), -1, dtype=torch.float32)


def _linear_log_prob(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return _log_probs(input, weight).gather(-1, target[:, None])[:, 0]


def _linear_distillation(student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    ours, theirs = (
        F.log_softmax(F.linear(x, w), -1, dtype=torch.float32)
        for x, w in ((student, weight), (teacher, teacher_weight))
    )
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _liger_log_prob(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return ops.linear_log_prob(input, weight, target).log_prob


CASES = (
    OpCase("rms_norm", _norm_inputs, _rms_norm, ops.rms_norm, ((16384, 2048), (8192, 8192)), (8, 64)),
    OpCase("add_rms_norm", _added_inputs, _add_rms_norm, ops.add_rms_norm, ((16384, 4096),), (8, 64)),
    OpCase("layer_norm", _layer_norm_inputs, _layer_norm, ops.layer_norm, ((16384, 2560), (16384, 4096)), (8, 64)),
    OpCase("swiglu", _gated_inputs, _swiglu, ops.swiglu, ((8192, 8192), (8192, 14336)), (8, 64)),
    OpCase("geglu", _gated_inputs, _geglu, ops.geglu, ((8192, 9216), (8192, 16384)), (8, 64)),
    OpCase("rotary", _rotary_inputs, _rotary, ops.rotary, ((8192, 32, 8, 64), (8192, 32, 8, 128)), (8, 4, 2, 16)),
    OpCase(
        "qk_norm_rotary", _qk_norm_rotary_inputs, _qk_norm_rotary, partial(ops.qk_norm_rotary, unsqueeze_dim=1),
        ((8192, 32, 8, 128),), (8, 4, 2, 16),
    ),
    OpCase("cross_entropy", _logit_inputs, _cross_entropy, ops.cross_entropy, ((8192, 32000), (4096, 128256)), (8, 99)),
    OpCase(
        "linear_cross_entropy", _head_inputs, _linear_cross_entropy, ops.linear_cross_entropy,
        ((8192, 2048, 32000), (4096, 2048, 128256)), (8, 16, 99),
    ),
    OpCase(
        "linear_log_prob", _head_inputs, _linear_log_prob, _liger_log_prob, ((4096, 2048, 128256),), (8, 16, 99)
    ),
    OpCase(
        "linear_distillation", _distilled_inputs, _linear_distillation,
        partial(ops.linear_distillation, beta=0.0), ((4096, 2048, 32000),), (8, 16, 99),
    ),
)  # fmt: skip
"""Every op, in the order of the table."""
