"""Whether an optimizer has changed a parameter since, also one that writes past autograd's version counter.

Optimizers with kernels of their own (bitsandbytes' 8-bit ones, torch's fused ones) write through pointers or `.data`,
which counts no version. All of them are a `torch.optim.Optimizer`, whose steps torch lets one watch.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_lock = threading.Lock()
_last_step: dict[int, tuple[weakref.ref[Optimizer], int]] = {}  # by id: an optimizer may be unhashable
_steps = 0


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    if torch.compiler.is_compiling():  # compiled steps count versions
        return
    with _lock:
        _steps += 1
        known = _last_step.get(id(optimizer))
        if known is None or known[0]() is not optimizer:
            for key in [key for key, (ref, _) in _last_step.items() if ref() is None]:
                del _last_step[key]
        _last_step[id(optimizer)] = weakref.ref(optimizer), _steps


@functools.cache
def _watch() -> None:
    """From the first loss of a head on: importing this file changes nothing in the process."""
    register_optimizer_step_post_hook(_note_step)


def steps_of(*parameters: Tensor | None) -> Callable[[], bool]:
    """A function that says whether any optimizer that trains one of the parameters has made a step since this call."""
    _watch()
    then, watched = _steps, [weakref.ref(parameter) for parameter in parameters if parameter is not None]

    def stepped() -> bool:
        alive = {id(parameter) for ref in watched if (parameter := ref()) is not None and parameter.requires_grad}
        with _lock:
            later = [optimizer for ref, step in _last_step.values() if step > then and (optimizer := ref()) is not None]
        return any(id(p) in alive for optimizer in later for group in optimizer.param_groups for p in group["params"])

    return stepped
