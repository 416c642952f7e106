"""A head whose weight is sharded over processes, by tensor parallelism or FSDP.

Tensor parallelism leaves a rank its rows of the weight, for good: the weight is a DTensor. Torch's `parallelize_module`
hands the head a replicated DTensor, by a hook. Transformers puts a forward of its own on the instance, which looks past
the class; there the swapped class answers first, while a loss is asked for, and takes the plain input that every rank
has alike.

FSDP makes the weight whole for a forward. Unless the head is a unit of its own, it is whole only until the model's
forward ends, and nothing gathers it when the head is called later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from liger.ops.vocab_parallel_cross_entropy import sharding_declines

_PLAIN = (Tensor, nn.Parameter)
_TRANSFORMERS = ("transformers.distributed.tensor_parallel", "TensorParallelLayer.install_forward.<locals>.tp_forward")


def is_whole(head: Any) -> bool:
    """Whether the head's weight is an ordinary tensor with a row for each of its outputs."""
    return type(head.weight) in _PLAIN and head.weight.shape == (head.out_features, head.in_features)


def is_gathered(now: Tensor, then: Tensor) -> bool:
    """Whether the weight that a forward saw, `then`, was made for it of parts, or brought from another device.

    FSDP1 marks its parameters, or has none and makes views; FSDP2's are DTensors outside of a forward; ZeRO-3 numbers
    its own; what accelerate offloads is on another device.
    """
    if now is then:
        return hasattr(now, "ds_id")
    marked = any(hasattr(t, name) for t in (now, then) for name in ("device_mesh", "ds_id", "_fsdp_flattened"))
    return marked or now.device != then.device or type(now) is type(then) is Tensor


def is_vocab_parallel(head: Any, hidden: Any) -> bool:
    """Whether tensor parallelism has shared out the rows of the head's weight, and every rank has the same `hidden`.

    A weight that FSDP has sharded looks the same, but there every rank has hidden states of its own.
    """
    weight = head.weight
    if not hasattr(weight, "device_mesh") or sharding_declines(weight, head.bias) or torch.compiler.is_compiling():
        return False
    if hasattr(hidden, "device_mesh"):
        return hidden.device_mesh == weight.device_mesh and hidden.placements[0].is_replicate()
    return has_transformers_forward(head) and type(hidden) in _PLAIN


def has_transformers_forward(head: nn.Module) -> bool:
    """Whether the forward on the instance is the one of transformers' tensor parallelism."""
    forward = vars(head).get("forward")
    return (getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)) == _TRANSFORMERS


def before_the_instance(answer: Callable[..., Any]) -> property:
    """`answer(module, input)` as a class's forward that is asked before one on the instance: it calls that itself."""

    def get(module: nn.Module) -> Callable[..., Any]:
        if not has_transformers_forward(module):  # put there since
            return vars(module)["forward"]
        return lambda input: answer(module, input)

    return property(get, lambda module, value: vars(module).__setitem__("forward", value))


def is_taken_away(model: nn.Module, head: Any) -> bool:
    """Whether FSDP may take the head's weight away when the forward of `model`, which is running, ends."""
    if _is_unit(head) or hasattr(head.weight, "device_mesh"):
        return False
    if _is_unit(model) or not isinstance(head.weight, nn.Parameter):  # FSDP1 puts views of its own there
        return True
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _is_unit(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def call_again(head: Any, hidden: Tensor, shape: torch.Size) -> Tensor:
    """`head(hidden)` after the model's forward has ended: logits of that shape.

    Raises:
        RuntimeError: the weight is not whole any more, or the head returns only a part of the logits.
    """
    try:
        logits = head(hidden)
    except RuntimeError as error:
        if is_whole(head):
            raise
        raise RuntimeError(
            "liger: outputs.logits are computed when they are first read, and the head's weight is no longer whole: "
            "make the head an FSDP unit of its own and read them before backward, or use liger.apply(model, "
            "loss='full')"
        ) from error
    if logits.shape != shape:
        raise RuntimeError(
            f"liger: the head returns logits of shape {tuple(logits.shape)}, a part of {tuple(shape)}: parallelize it "
            "with output_layouts=Replicate()"
        )
    return logits
