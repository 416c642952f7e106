"""What is measured: one `Case` for every op and shape, with the inputs, the peers and the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import exact, peers

Sizes = tuple[int, ...]


@dataclass
class Problem:
    """The inputs of a case. Its functions are called with `rows` and `shared` as keyword arguments."""

    rows: dict[str, Tensor]
    """Tensors whose first dimension can be split without changing what the op does to a row."""
    shared: dict[str, Tensor]
    """Tensors that every row sees: weights, cos and sin."""
    wrt: tuple[str, ...]
    """The inputs whose gradients are taken."""
    upstream: tuple[Tensor | None, ...] | None
    """The outputs' gradients, None for an output that is only looked at; None for a loss, whose own is 1."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """All of them."""
        return {**self.rows, **self.shared}


@dataclass(frozen=True)
class Case:
    """An op at one shape."""

    op: str
    sizes: Sizes
    tiny: Sizes
    """Sizes at which the device is never waited for: host time is measured there, and a CPU can run it."""
    make: Callable[[Sizes, torch.device], Problem]
    peers: dict[str, Callable[[], Callable[..., Any]]]
    exact: Callable[..., Any]
    """The op in plain torch, for the errors: called in fp64, on as many rows as `chunk` says. Sums a loss."""
    chunk: int
    moved: int = 0
    """Bytes that forward and backward must move: each input read once and each output written once, in both."""
    flops: int = 0
    """Operations that they cannot do without, where the op is bound by them."""
    more: bool = False
    """One of the shapes that only `--all` measures."""

    @property
    def shape(self) -> str:
        """The sizes as text."""
        return "×".join(map(str, self.sizes))


def _random(*shape: int, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(torch.bfloat16)


def _norm(sizes: Sizes, device: torch.device, bias: bool) -> Problem:
    rows, columns = sizes
    shared = {"weight": _random(columns, device=device, scale=0.1) + 1}
    if bias:
        shared["bias"] = _random(columns, device=device, scale=0.1)
    x = _random(rows, columns, device=device)
    return Problem({"x": x}, shared, ("x", *shared), (_random(rows, columns, device=device),))


def _added_norm(sizes: Sizes, device: torch.device) -> Problem:
    inputs = {name: _random(*sizes, device=device) for name in ("x", "residual")}
    shared = {"weight": _random(sizes[1], device=device, scale=0.1) + 1}
    upstream = (_random(*sizes, device=device), _random(*sizes, device=device))
    return Problem(inputs, shared, ("x", "residual", "weight"), upstream)


def _gated(sizes: Sizes, device: torch.device) -> Problem:
    inputs = {name: _random(*sizes, device=device) for name in ("gate", "up")}
    return Problem(inputs, {}, ("gate", "up"), (_random(*sizes, device=device),))


def _rotary(sizes: Sizes, device: torch.device) -> Problem:
    batch, sequence, heads, kv_heads, dim = sizes
    angle = torch.arange(sequence, device=device)[:, None] / 10000 ** (torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.cat([angle, angle], -1)[None]
    # As a model makes them: (batch, sequence, heads, dim) in memory, seen as (batch, heads, sequence, dim).
    q, dq = (_random(batch, sequence, heads, dim, device=device).transpose(1, 2) for _ in range(2))
    k, dk = (_random(batch, sequence, kv_heads, dim, device=device).transpose(1, 2) for _ in range(2))
    shared = {"cos": angle.cos().to(torch.bfloat16), "sin": angle.sin().to(torch.bfloat16)}
    return Problem({"q": q, "k": k}, shared, ("q", "k"), (dq, dk))


def _normed_rotary(sizes: Sizes, device: torch.device) -> Problem:
    problem = _rotary(sizes, device)
    weights = {name: _random(sizes[-1], device=device, scale=0.1) + 1 for name in ("q_weight", "k_weight")}
    return Problem(problem.rows, {**weights, **problem.shared}, ("q", "k", *weights), problem.upstream)


def _logits(sizes: Sizes, device: torch.device) -> Problem:
    rows, vocabulary = sizes
    rowed = {
        "logits": _random(rows, vocabulary, device=device, scale=2.0),
        "target": torch.randint(vocabulary, (rows,), device=device),
    }
    return Problem(rowed, {}, ("logits",), None)


def _linear_loss(sizes: Sizes, device: torch.device) -> Problem:
    rows, hidden, vocabulary = sizes
    rowed = {
        "input": _random(rows, hidden, device=device),
        "target": torch.randint(vocabulary, (rows,), device=device),
    }
    weight = _random(vocabulary, hidden, device=device, scale=hidden**-0.5)
    return Problem(rowed, {"linear_weight": weight}, ("input", "linear_weight"), None)


def _linear_per_token(sizes: Sizes, device: torch.device) -> Problem:
    upstream = (torch.randn(sizes[0], device=device), None)
    return dataclasses.replace(_linear_loss(sizes, device), upstream=upstream)


def _rms_norm(*sizes: int, more: bool = False) -> Case:
    rows, columns = sizes
    return Case(
        "rms_norm", sizes, (64, columns), lambda s, d: _norm(s, d, bias=False), peers.RMS_NORM, exact.rms_norm,
        chunk=rows, moved=10 * rows * columns, more=more,
    )  # fmt: skip


def _add_rms_norm(*sizes: int) -> Case:
    rows, columns = sizes
    return Case(
        "add_rms_norm", sizes, (64, columns), _added_norm, peers.ADD_RMS_NORM, exact.add_rms_norm, chunk=rows // 2,
        moved=16 * rows * columns,
    )  # fmt: skip


def _layer_norm(*sizes: int, more: bool = False) -> Case:
    rows, columns = sizes
    return Case(
        "layer_norm", sizes, (64, columns), lambda s, d: _norm(s, d, bias=True), peers.LAYER_NORM,
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5), chunk=rows,
        moved=10 * rows * columns, more=more,
    )  # fmt: skip


def _swiglu(*sizes: int) -> Case:
    rows, columns = sizes
    return Case(
        "swiglu", sizes, (64, 512), _gated, peers.SWIGLU, lambda gate, up: F.silu(gate) * up, chunk=rows,
        moved=16 * rows * columns,
    )  # fmt: skip


def _geglu(*sizes: int) -> Case:
    rows, columns = sizes
    return Case(
        "geglu", sizes, (64, 512), _gated, peers.GEGLU, lambda gate, up: F.gelu(gate, approximate="tanh") * up,
        chunk=rows, moved=16 * rows * columns,
    )  # fmt: skip


def _rope(*sizes: int) -> Case:
    batch, sequence, heads, kv_heads, dim = sizes
    return Case(
        "rotary", sizes, (1, 16, heads, kv_heads, dim), _rotary, peers.ROTARY, exact.rotary, chunk=1,
        moved=8 * batch * sequence * (heads + kv_heads) * dim,
    )  # fmt: skip


def _qk_norm_rotary(*sizes: int) -> Case:
    batch, sequence, heads, kv_heads, dim = sizes
    return Case(
        "qk_norm_rotary", sizes, (1, 16, heads, kv_heads, dim), _normed_rotary, peers.QK_NORM_ROTARY,
        exact.qk_norm_rotary, chunk=1, moved=10 * batch * sequence * (heads + kv_heads) * dim,
    )  # fmt: skip


def _cross_entropy(*sizes: int) -> Case:
    rows, vocabulary = sizes
    return Case(
        "cross_entropy", sizes, (64, 1024), _logits, peers.CROSS_ENTROPY,
        lambda logits, target: F.cross_entropy(logits, target, reduction="sum"), chunk=1024,
        moved=4 * rows * vocabulary,  # one read and one write: the gradient can be made where the loss is
    )  # fmt: skip


def _linear_cross_entropy(*sizes: int, more: bool = False) -> Case:
    rows, hidden, vocabulary = sizes
    return Case(
        "linear_cross_entropy", sizes, (64, 128, 1024), _linear_loss, peers.LINEAR_CROSS_ENTROPY,
        lambda input, linear_weight, target: F.cross_entropy(input @ linear_weight.T, target, reduction="sum"),
        chunk=1024, flops=6 * rows * hidden * vocabulary, more=more,
    )  # fmt: skip


def _linear_log_prob(*sizes: int) -> Case:
    rows, hidden, vocabulary = sizes
    return Case(
        "linear_log_prob", sizes, (64, 128, 1024), _linear_per_token, peers.LINEAR_LOG_PROB, exact.linear_log_prob,
        chunk=1024, flops=8 * rows * hidden * vocabulary,  # the logits twice: every token has its own upstream gradient
    )  # fmt: skip


_LINEAR_SHAPES = (
    (8192, 4096, 128256), (16384, 2048, 128256), (8192, 3584, 152064), (4096, 2304, 256000), (16384, 4096, 32000),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    _rms_norm(32768, 2048), _rms_norm(16384, 4096), _rms_norm(16384, 3584), _rms_norm(8192, 8192),
    _rms_norm(16384, 5120),
    # Hidden sizes that are no power of two or are large, and the many short rows of a norm on heads.
    _rms_norm(32768, 1536, more=True), _rms_norm(16384, 2304, more=True), _rms_norm(16384, 3072, more=True),
    _rms_norm(4096, 16384, more=True), _rms_norm(1048576, 64, more=True), _rms_norm(1048576, 128, more=True),
    _rms_norm(524288, 256, more=True),
    _add_rms_norm(32768, 2048), _add_rms_norm(16384, 4096),
    _layer_norm(16384, 2560), _layer_norm(16384, 4096), _layer_norm(4096, 16384, more=True),
    _swiglu(8192, 14336),
    _geglu(16384, 9216),
    _rope(4, 4096, 32, 8, 128), _rope(1, 16384, 16, 8, 256),
    _qk_norm_rotary(4, 4096, 32, 8, 128), _qk_norm_rotary(1, 16384, 8, 4, 256),
    _cross_entropy(8192, 128256), _cross_entropy(8192, 32000), _cross_entropy(4096, 262144),
    *(_linear_cross_entropy(*sizes) for sizes in _LINEAR_SHAPES),
    # Short batches and a small vocabulary, where the host's time is what counts.
    _linear_cross_entropy(256, 512, 1000, more=True), _linear_cross_entropy(256, 2048, 32000, more=True),
    _linear_cross_entropy(256, 4096, 128256, more=True),
    *(_linear_log_prob(*sizes) for sizes in _LINEAR_SHAPES),
)  # fmt: skip
"""Every op at its shapes; the first shape of an op is the one that `--quick` takes."""
