"""A backward that cannot be differentiated again: a second derivative raises instead of counting as zero.

torch's decorator of that name refuses only where the upstream gradient has a graph. That of a loss is a constant, and
what a gradient penalty adds would be left out in silence. So would the gradient of chosen tensors, since autograd only
goes to nodes that lead to them: what refuses leads to all that forward saved. torch also enters `no_grad` around every
backward; in one that does not build a graph gradients are off already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable as guarded_by_torch


class _Refusal(torch.autograd.Function):
    """Hands on the first `count` tensors; a derivative of them raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "liger: trying to differentiate twice a function that was marked with @once_differentiable: its kernels "
            "have no second derivative, PyTorch's own code has"
        )


class _Unpacked:
    """A ctx whose saved tensors are unpacked: a checkpoint lets them be only once."""

    def __init__(self, ctx: Any) -> None:
        vars(self).update(ctx=ctx, saved_tensors=ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ctx, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.ctx, name, value)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an `autograd.Function`: a second derivative raises, whatever the upstream gradient."""
    guarded = guarded_by_torch(backward)

    def once(ctx: Any, *upstream: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        if torch.compiler.is_compiling():  # which refuses a second backward, but not one of chosen tensors, by itself
            return guarded(ctx, *upstream)
        ctx = _Unpacked(ctx)
        with torch.no_grad():
            result = backward(ctx, *upstream)
        gradients = result if isinstance(result, tuple) else (result,)
        there = [gradient for gradient in gradients if gradient is not None]
        leads_to = [t for t in (*ctx.saved_tensors, *upstream) if t is not None and t.requires_grad]
        refused = iter(_Refusal.apply(len(there), *there, torch.zeros((), requires_grad=True), *leads_to))
        return tuple(None if gradient is None else next(refused) for gradient in gradients)

    return once
