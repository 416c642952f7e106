"""torch's `once_differentiable`, without its price where nobody differentiates twice.

torch enters `no_grad` around every backward. In one that does not build a graph gradients are off already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable as guarded_by_torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an `autograd.Function`: a second derivative raises, it is never taken to be zero."""
    guarded = guarded_by_torch(backward)

    def once(ctx: Any, *upstream: Any) -> Any:
        return guarded(ctx, *upstream) if torch.is_grad_enabled() else backward(ctx, *upstream)

    return once
