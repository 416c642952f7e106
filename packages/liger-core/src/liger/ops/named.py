"""What an op is called in the tables and traces of `torch.profiler`.

PyTorch itself opens a profiler range around each forward and backward of an `autograd.Function`, under the name of its
class, and draws the arrow from one to the other. So a name is all that is needed, and it costs the host nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=torch.autograd.Function)


def named(op: str) -> Callable[[type[F]], type[F]]:
    """Decorate an `autograd.Function`: its ranges are called `liger::<op>` and `liger::<op>Backward`."""

    def name(function: type[F]) -> type[F]:
        metaclass: Any = type(function)
        return metaclass(f"liger::{op}", (function,), {"__module__": function.__module__, "__doc__": function.__doc__})

    return name
