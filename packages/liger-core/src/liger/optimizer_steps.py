"""Whether an optimizer has changed a parameter since a given moment, even where autograd's version counter misses it.

Optimizers with kernels of their own (bitsandbytes' 8-bit ones, torch's fused ones) write through pointers or `.data`,
which counts no version. All of them are a `torch.optim.Optimizer`, whose steps torch lets one watch.
"""

from __future__ import annotations

import functools
import threading
import weakref
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
    register_optimizer_step_post_hook(torch.compiler.disable(_note_step))  # or it would run once, when a step is traced


class StepsSince:
    """The steps that optimizers have made since this was made, as far as they concern some parameters."""

    def __init__(self, *parameters: Tensor | None) -> None:
        _watch()
        self._then = _steps
        self._parameters = [weakref.ref(parameter) for parameter in parameters if parameter is not None]

    def any(self) -> bool:
        """Whether any optimizer has made one."""
        return _steps > self._then

    def changed(self, got_gradients: bool) -> bool:
        """Whether an optimizer that holds one of the parameters has made one.

        If they `got_gradients` and no known optimizer holds them, any step counts: of one that holds a shard, or a copy
        in fp32.
        """
        alive = {id(p) for ref in self._parameters if (p := ref()) is not None and p.requires_grad}
        with _lock:
            known = [(optimizer, step) for ref, step in _last_step.values() if (optimizer := ref()) is not None]
        holding = [step for optimizer, step in known if not alive.isdisjoint(_held(optimizer))]
        if alive and got_gradients and not holding:
            return self.any()
        return any(step > self._then for step in holding)


def _held(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
