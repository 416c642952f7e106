r"""What a model does to its head's output x before the loss: it scales it, and some models cap it.

    z     = softcap · tanh(logit_scale · x / softcap)             z = logit_scale · x without a softcap
    dz/dx = logit_scale · c     c = 1 − tanh²(logit_scale · x / softcap)

The softcap is Gemma 2's (https://arxiv.org/abs/2408.00118).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from liger.ops.launch import jit, tl
from liger.ops.tanh import tanh, tanh_derivative


class Scaling(NamedTuple):
    """The scale, and the softcap or None."""

    logit_scale: float = 1.0
    softcap: float | None = None


def reference_z(logits: Tensor, scaling: Scaling) -> Tensor:
    """z in fp32 (fp64 for fp64), differentiable; the logits themselves where that changes nothing."""
    z = _scaled(logits, scaling)
    return z if scaling.softcap is None else scaling.softcap * torch.tanh(z / scaling.softcap)


def reference_c(logits: Tensor, scaling: Scaling) -> Tensor:
    """c of a softcap, by 1 / cosh², in which no digits are lost."""
    assert scaling.softcap is not None
    return torch.cosh(_scaled(logits, scaling) / scaling.softcap).square_().reciprocal_()


def _scaled(logits: Tensor, scaling: Scaling) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if scaling.logit_scale == 1 else wide * scaling.logit_scale


@jit(varying=())
def scaled_z(x, logit_scale, softcap, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):  # noqa: ANN201
    """z in a kernel, in fp32."""
    z = x.to(tl.float32)
    if HAS_SCALE:
        z = z * logit_scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


@jit(varying=())
def softcap_c(x, logit_scale, softcap, HAS_SCALE: tl.constexpr):  # noqa: ANN201
    """c of a softcap in a kernel, in fp32."""
    return tanh_derivative(scaled_z(x, logit_scale, softcap, HAS_SCALE, HAS_SOFTCAP=False) / softcap)
