"""The numbers that an op takes as constants: what learns would train as if it were frozen, so it is refused."""

from __future__ import annotations

from torch import Tensor


def constant(op: str, name: str, value: float | Tensor) -> float:
    """`value` as a float; refuses one that is learned, several, and what is no number."""
    if type(value) is float:
        return value
    refuse_learned(op, name, value)
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, expected one number")
    if value is None or isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a number, not {value!r}")
    return float(value)


def refuse_learned(op: str, name: str, value: float | Tensor | None) -> None:
    """Refuse a tensor that waits for a gradient: it would get none."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{op}: {name} requires a gradient and would get none: it is a constant here")
