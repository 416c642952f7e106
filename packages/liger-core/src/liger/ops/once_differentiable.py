"""Of a backward that has no derivative: a second one raises, it is never taken to be zero.

torch's decorator of that name refuses only where the upstream gradient has a graph. That of a loss is a constant, and
what a gradient penalty adds would be left out in silence. torch also enters `no_grad` around every backward; in one
that does not build a graph gradients are off already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as guarded_by_torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an `autograd.Function`: a second derivative raises, whatever the upstream gradient."""
    guarded = guarded_by_torch(backward)

    def once(ctx: Any, *upstream: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *upstream)
        if not torch.compiler.is_compiling():  # which refuses a second backward itself
            upstream = tuple(None if gradient is None else gradient.detach().requires_grad_() for gradient in upstream)
        return guarded(ctx, *upstream)

    return once
