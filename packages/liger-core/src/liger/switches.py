"""What is asked of `liger.apply`, whose docstring says what each switch means."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from liger.adapter import Kind

Loss = Literal["linear", "full"] | None
Part = Kind | Literal["recompute"]


class _Default(int):
    """A True that nobody passed: the kernel is wanted where it can be had, and its absence is no error."""

    def __repr__(self) -> str:
        return "True"


class _DefaultLoss(str):
    """A "linear" that nobody passed: where the head declines it, "full" will do."""


TRUE: Any = _Default(1)
LINEAR: Any = _DefaultLoss("linear")


@dataclass(frozen=True)
class Switches:
    """The switches of one call, by the names of `liger.apply`.

    Raises:
        ValueError: `loss` is unknown.
    """

    rope: bool = TRUE
    norm: bool = TRUE
    mlp: bool = TRUE
    experts: bool = TRUE
    loss: Loss = LINEAR
    recompute: bool = False

    def __post_init__(self) -> None:
        if self.loss not in ("linear", "full", None):
            raise ValueError(f"liger.apply: loss must be 'linear', 'full' or None, not {self.loss!r}")

    def asked_by_name(self) -> dict[str, Any]:
        """The switches that somebody has turned on by passing them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value for name, value in values.items() if value and not isinstance(value, _Default | _DefaultLoss)
        }


DEFAULTS = Switches()
