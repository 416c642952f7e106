"""What is asked of `liger.apply`, whose docstring says what each switch means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from liger.adapter import Kind

Loss = Literal["linear", "full"] | None
Part = Kind | Literal["recompute"]


_OF_PEFT = re.compile(r"\.(original_module|base_layer|(modules_to_save|ln_tuning_layers)\.[^.]+)(?=\.|$)")
"""What PEFT puts between the name of a module that it wraps and those of the module and of its copies."""


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
        TypeError: `skip` is one string, or no list of strings.
    """

    rope: bool = TRUE
    norm: bool = TRUE
    mlp: bool = TRUE
    experts: bool = TRUE
    loss: Loss = LINEAR
    recompute: bool = False
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.loss not in ("linear", "full", None):
            raise ValueError(f"liger.apply: loss must be 'linear', 'full' or None, not {self.loss!r}")
        patterns = tuple(self.skip) if isinstance(self.skip, Iterable) and not isinstance(self.skip, str) else None
        if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(f"liger.apply: skip must be a list of patterns, not {self.skip!r}")
        object.__setattr__(self, "skip", patterns)

    def asked_by_name(self) -> dict[str, Any]:
        """The switches that somebody has turned on by passing them."""
        on = {name: value for name, value in vars(self).items() if value and name != "skip"}
        return {name: value for name, value in on.items() if not isinstance(value, _Default | _DefaultLoss)}

    def skipped(self, name: str) -> str | None:
        """Why the module of that name is left out, or None."""
        pattern = next((pattern for pattern in self.skip if matches(name, pattern)), None)
        return None if pattern is None else f"skipped by {pattern!r}"


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of `skip` means the module of that name: by all of it, or by its end after some dot.

    What PEFT puts behind the name of a module that it wraps may be left out.
    """
    names = (name, _OF_PEFT.sub("", name))
    return any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for name in names)


DEFAULTS = Switches()
