"""What autocast computes in on a device, and the same again later."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in on that device, or None where it is off or there is none (meta)."""
    kind = device.type
    # the question cannot be traced by torch 2.11; what is compiled runs where there is autocast, or nowhere
    available = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    return torch.get_autocast_dtype(kind) if available and torch.is_autocast_enabled(kind) else None


def under_autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast computes in `dtype` on that device, or is off if that is None."""
    if autocast_dtype(device) == dtype:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
