"""Whether an optimizer has changed a parameter since, also one that writes past autograd's version counter.

Optimizers with kernels of their own (bitsandbytes' 8-bit ones, fused ones) write through pointers or `.data`, which
counts no version. All of them are a `torch.optim.Optimizer`, whose steps torch lets one watch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

_last_step: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
_steps = 0


def _note_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    if not torch.compiler.is_compiling():  # compiled steps count versions
        _steps += 1
        _last_step[optimizer] = _steps


register_optimizer_step_post_hook(_note_step)


def steps_of(*parameters: Tensor | None) -> Callable[[], bool]:
    """A function that says whether any optimizer that holds one of the parameters has made a step since this call."""
    then, watched = _steps, [weakref.ref(parameter) for parameter in parameters if parameter is not None]

    def stepped() -> bool:
        alive = {id(parameter) for ref in watched if (parameter := ref()) is not None}
        later = [optimizer for optimizer, step in list(_last_step.items()) if step > then]
        return any(id(p) in alive for optimizer in later for group in optimizer.param_groups for p in group["params"])

    return stepped
