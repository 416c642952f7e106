"""Who is measured: for each op what transformers does, that under torch.compile, what a user would install, and ours.

A peer is a function that returns the function to measure, so that a package is imported when its turn comes: one that
is not installed is left out by name, and one that fails does so where it is recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[..., Any]

_MODULES: dict[str, tuple[str, ...]] = {
    "eager": (),
    "compile": (),
    "liger-kernel": ("liger_kernel",),
    "liger-kernel-cutedsl": ("liger_kernel", "cutlass"),
    "cut-cross-entropy": ("cut_cross_entropy",),
    "flash-linear-attention": ("fla", "einops"),
    "quack-kernels": ("quack", "cutlass"),
    "trl": ("trl",),
    "liger": ("liger",),
}
NAMES = tuple(_MODULES)
"""All of them; an op has those that have a kernel for it."""


def not_installed() -> list[str]:
    """The peers that this run cannot measure, because a module that they need is missing."""
    return [name for name, modules in _MODULES.items() if not all(find_spec(module) for module in modules)]


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


def _linear_log_prob(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(F.linear(input, linear_weight), dim=-1, dtype=torch.float32)
    # As trainers do that only log it: without a graph, some rows at a time.
    entropy = torch.cat([-(part.exp() * part).sum(-1) for part in log_p.detach().split(1024)])
    return log_p.gather(-1, target[:, None])[:, 0], entropy


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


def _cutedsl(name: str, call: Callable[[Peer], Peer]) -> Callable[[], Peer]:
    """The class that liger-kernel puts in the place of its Triton one when LIGER_KERNEL_IMPL=cutedsl is set."""
    return lambda: call(getattr(import_module("liger_kernel.ops.cutedsl.ops"), name).apply)


def _from(module: str, name: str, call: Callable[[Peer], Peer]) -> Callable[[], Peer]:
    return lambda: call(getattr(import_module(module), name))


def _trl_linear_log_prob() -> Peer:
    """TRL's fused head with the tile that its trainers give it, asked for what ours returns."""
    apply = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction.apply
    try:
        import_module("trl.trainer.utils")
    except ModuleNotFoundError:
        # Its backward takes one function from there, which gathers ZeRO-3's parts of a weight and else does nothing.
        # The rest of that module needs datasets and pandas.
        utils: Any = ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
        sys.modules[utils.__name__] = utils

    def call(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        outputs = apply(input, linear_weight, None, target, 1.0, 32768, None, 1.0, ("entropy", "is_top1"))
        return outputs[0], outputs[1]

    return call


def _peers(eager: Peer, **others: Callable[[], Peer]) -> dict[str, Callable[[], Peer]]:
    found = {name.replace("_", "-"): load for name, load in others.items()}
    found |= {"eager": lambda: eager, "compile": lambda: torch.compile(eager, dynamic=False)}
    return {name: found[name] for name in NAMES if name in found}


RMS_NORM = _peers(
    _rms_norm,
    liger=_op("rms_norm", eps=1e-6),
    liger_kernel=_liger_kernel("liger_rms_norm", lambda f: lambda x, weight: f(x, weight, 1e-6)),
    liger_kernel_cutedsl=_cutedsl("LigerRMSNormFunction", lambda f: lambda x, weight: f(x, weight, 1e-6)),
    flash_linear_attention=_from(
        "fla.modules.norm.layernorm", "rms_norm", lambda f: lambda x, weight: f(x, weight, None, eps=1e-6)
    ),
    quack_kernels=_from("quack.rmsnorm", "rmsnorm", lambda f: lambda x, weight: f(x, weight, eps=1e-6)),
)
ADD_RMS_NORM = _peers(
    _add_rms_norm,
    liger=_op("add_rms_norm", eps=1e-6),
    liger_kernel=_liger_kernel(
        "liger_fused_add_rms_norm", lambda f: lambda x, residual, weight: f(x, residual, weight, 1e-6)
    ),
    flash_linear_attention=_from(
        "fla.modules.norm.layernorm", "rms_norm",
        lambda f: lambda x, residual, weight: f(x, weight, None, residual=residual, eps=1e-6, prenorm=True),
    ),
    quack_kernels=_from(
        "quack.rmsnorm", "rmsnorm",
        lambda f: lambda x, residual, weight: f(x, weight, residual=residual, eps=1e-6, prenorm=True),
    ),
)  # fmt: skip
LAYER_NORM = _peers(
    _layer_norm,
    liger=_op("layer_norm", eps=1e-5),
    liger_kernel=_liger_kernel("liger_layer_norm", lambda f: lambda x, weight, bias: f(x, weight, bias, 1e-5)),
    flash_linear_attention=_from(
        "fla.modules.norm.layernorm", "layer_norm", lambda f: lambda x, weight, bias: f(x, weight, bias, eps=1e-5)
    ),
)
SWIGLU = _peers(
    _swiglu,
    liger=_op("swiglu"),
    liger_kernel=_liger_kernel("liger_swiglu", lambda f: lambda gate, up: f(gate, up)),
    liger_kernel_cutedsl=_cutedsl("LigerSiLUMulFunction", lambda f: lambda gate, up: f(gate, up)),
    flash_linear_attention=_from("fla.modules.activations.ops", "swiglu", lambda f: lambda gate, up: f(gate, up)),
)
GEGLU = _peers(
    _geglu,
    liger=_op("geglu", approximate="tanh"),
    liger_kernel=_liger_kernel("liger_geglu", lambda f: lambda gate, up: f(gate, up)),
)
ROTARY = _peers(
    _rotary,
    liger=_op("rotary"),
    liger_kernel=_liger_kernel("liger_rope", lambda f: lambda q, k, cos, sin: f(q, k, cos, sin)),
    liger_kernel_cutedsl=_cutedsl("LigerRopeFunction", lambda f: lambda q, k, cos, sin: f(q, k, cos, sin)),
)
QK_NORM_ROTARY = _peers(
    _qk_norm_rotary,
    liger=_op("qk_norm_rotary", eps=1e-6, unsqueeze_dim=1),
    liger_kernel=_liger_kernel_qk_norm_rotary,
)
CROSS_ENTROPY = _peers(
    _cross_entropy,
    liger=_op("cross_entropy"),
    liger_kernel=_liger_kernel("liger_cross_entropy", lambda f: lambda logits, target: f(logits, target)),
    # It returns the loss, and three things that were not asked for.
    liger_kernel_cutedsl=_cutedsl(
        "LigerCrossEntropyFunction", lambda f: lambda logits, target: f(logits, target, None)[0]
    ),
    # It returns each row's loss, and each row's z-loss.
    flash_linear_attention=_from(
        "fla.modules.fused_cross_entropy.ops", "cross_entropy_loss",
        lambda f: lambda logits, target: f(logits, target)[0].mean(),
    ),
    quack_kernels=_from("quack.cross_entropy", "cross_entropy", lambda f: lambda logits, target: f(logits, target)),
)  # fmt: skip
LINEAR_CROSS_ENTROPY = _peers(
    _linear_cross_entropy,
    liger=_op("linear_cross_entropy"),
    liger_kernel=_liger_kernel(
        "liger_fused_linear_cross_entropy",
        lambda f: lambda input, linear_weight, target: f(input, linear_weight, target),
    ),
    liger_kernel_cutedsl=_cutedsl(
        "LigerFusedLinearCrossEntropyFunction",
        lambda f: lambda input, linear_weight, target: f(input, linear_weight, target)[0],
    ),
    cut_cross_entropy=_from(
        "cut_cross_entropy", "linear_cross_entropy",
        lambda f: lambda input, linear_weight, target: f(input, linear_weight, target),
    ),
    flash_linear_attention=_from(
        "fla.modules.fused_linear_cross_entropy.ops", "fused_linear_cross_entropy_loss",
        lambda f: lambda input, linear_weight, target: f(input, target, linear_weight),
    ),
    quack_kernels=_from(
        "quack.linear_cross_entropy", "chunked_linear_cross_entropy",
        lambda f: lambda input, linear_weight, target: f(input, linear_weight, target),
    ),
)  # fmt: skip
LINEAR_LOG_PROB = _peers(
    _linear_log_prob,
    liger=_from("liger.ops", "linear_log_prob", lambda f: lambda **inputs: f(**inputs)[:2]),
    trl=_trl_linear_log_prob,
)
