"""`verify`: a few random tokens through the stock and the patched model; their losses and all gradients compared.

The modules are the user's own: their classes are switched to and fro, and the weights exist once. What counts as a
difference stands in `yardstick`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liger.known_code import described
from liger.patch import apply
from liger.subclass import Swappable, function_class, layer_class, model_class, recompute_class
from liger.yardstick import Yardstick

__all__ = ["Compared", "Verification", "verify"]

FACTOR = 2.0
"""How many times stock's own rounding the loss or a gradient may be off."""

_ROWS, _LENGTH = 2, 48
_LISTED = 5


class Compared(NamedTuple):
    """The loss or one gradient: its relative distance from stock's, and what rounding moves stock's own by."""

    name: str
    error: float
    rounding: float

    @property
    def same(self) -> bool:
        """Whether rounding explains the distance."""
        return self.error <= FACTOR * self.rounding

    def __str__(self) -> str:
        return f"{self.name} is off by {self.error:.1e}; stock's own rounding is {self.rounding:.1e}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Print it.

    Attributes:
        subject: the model, its dtype and device.
        compared: the loss and the gradient of every trainable parameter, the farthest off (in its rounding) first.
        suspects: the swapped parts that make a difference by themselves. Empty where only several together do.
        unreached: names of swapped modules that the inputs never reach, which are not verified therefore.
        repeated: whether a first batch of tokens differed and a second did not: near-ties, as in a router, do that.
    """

    subject: str
    compared: tuple[Compared, ...]
    suspects: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    repeated: bool = False

    @property
    def differing(self) -> tuple[Compared, ...]:
        """What is farther from stock than rounding explains."""
        return tuple(c for c in self.compared if not c.same)

    @property
    def ok(self) -> bool:
        """Whether rounding explains the loss and every gradient."""
        return not self.differing

    def __str__(self) -> str:
        differing, gradients = self.differing, len(self.compared) - 1
        if not differing:
            lines = [
                f"the loss and {gradients} gradients are stock's, but for rounding",
                f"at most, {self.compared[0]}",
            ]
        else:
            lines = [f"{len(differing)} of the loss and {gradients} gradients differ from stock"]
            lines += [f"because of {suspect}" for suspect in self.suspects or ("no swapped part alone",)]
            lines += [str(c) for c in differing[:_LISTED]]
            if len(differing) > _LISTED:
                lines.append(f"and {len(differing) - _LISTED} more")
        if self.repeated:
            lines.append("a first batch of tokens differed and a second did not: near-ties, as in a router, do that")
        if self.unreached:
            lines.append(f"{len(self.unreached)} swapped modules were not reached: {', '.join(self.unreached)}")
        return f"liger.verify: {self.subject}: " + "\n  ".join(lines)


def verify(model: nn.Module, *, inputs: Mapping[str, Any] | None = None, seed: int = 0) -> Verification:
    """Compare a step of the patched model with the same step of the stock one: loss and every trainable gradient.

    A model that is patched is verified with what it has been patched with; another one with all of `liger.apply`, which
    is undone. Everything is as it was when this returns or raises: classes, gradients, modes, buffers, random states.

    Both run in training mode, dropout with the same random numbers, under the autocast that is active here, eagerly
    even where the model is compiled. A difference counts when two batches of tokens, or two runs of `inputs`, show it.
    The device needs the memory of a training step of so few tokens, and the host that of the gradients.

    Args:
        model: as for `liger.apply`, but not sharded: verify it before fully_shard, FSDP, DeepSpeed or tensor
            parallelism. Of DistributedDataParallel the module inside is verified, by each rank alone.
        inputs: what the model is called with, labels included; 96 random tokens unless given. A model that needs more
            than tokens (images, token types) needs them given.
        seed: of the random tokens and roundings.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: it is sharded or on the meta device, nothing of it can be swapped, a swapped module was changed
            since, or its outputs hold no loss.
        FloatingPointError: stock's own loss or one of its gradients is not finite.
        liger.NoAdapterError: or another error of `liger.apply`, where the model was not patched.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"liger.verify: model must be a torch.nn.Module, not {type(model).__name__}")
    _refuse_sharded(model)
    while isinstance(model, (nn.parallel.DistributedDataParallel, torch._dynamo.OptimizedModule)):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    patch = None if _parts(model) else apply(model)
    try:
        parts = _parts(model)
        if not parts:
            raise ValueError(f"liger.verify: nothing of {type(model).__name__} is swapped: {patch}")
        with _left_as_found(model, parts):
            return _compare(model, parts, inputs, seed)
    finally:
        if patch is not None:
            patch.undo()


class _Part(NamedTuple):
    """The modules that run one kernel, by name, and their classes with it."""

    label: str
    modules: dict[str, nn.Module]
    classes: list[type[Any]]

    def switch(self, patched: bool) -> None:
        for module, cls in zip(self.modules.values(), self.classes, strict=True):
            module.__class__ = cls if patched else cls._recipe[1]

    def rounding(self) -> Iterator[nn.Module]:
        """The modules that round otherwise with the kernel than without: for the loss, the head."""
        for module, cls in zip(self.modules.values(), self.classes, strict=True):
            subclass, _, recipe = cls._recipe
            if subclass is model_class and recipe.find_head(module) is not None:
                yield recipe.find_head(module)
            elif subclass not in (model_class, recompute_class):
                yield module


def _parts(model: nn.Module) -> list[_Part]:
    """What is swapped in `model`. Raises ValueError where switching a module's class would not switch what runs."""
    found: dict[str, _Part] = {}
    for name, module in model.named_modules():
        cls: Any = type(module)
        if not issubclass(cls, Swappable):
            continue
        if "_recipe" not in vars(cls):
            raise ValueError(f"liger.verify: {name} was swapped by liger.apply and has become a {cls.__name__} since")
        subclass, base, recipe = cls._recipe
        label, method = "the loss", "forward"
        if subclass is layer_class:
            label, method = f"{recipe.kind}, {base.__name__} → {recipe}", recipe.method
        elif subclass is function_class:
            label = f"rope, {base.__name__} → {', '.join(op.__name__ for _, op in recipe)}"
        elif subclass is recompute_class:
            label = "recompute"
        if method in vars(module):
            raise ValueError(
                f"liger.verify: since liger.apply, the {method} of {name or 'the model itself'} was replaced on the "
                f"instance by {described(vars(module)[method])}"
            )
        part = found.setdefault(label, _Part(label, {}, []))
        part.modules[name] = module
        part.classes.append(cls)
    return list(found.values())


def _refuse_sharded(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if any(cls.__module__.startswith("torch.distributed.fsdp") for cls in type(module).__mro__):
            raise ValueError(f"liger.verify: {name or 'the model'} is sharded by FSDP: verify the model before that")
    for name, parameter in model.named_parameters():
        how = "a DTensor" if hasattr(parameter, "device_mesh") else None
        how = "partitioned by ZeRO-3" if hasattr(parameter, "ds_id") else how
        how = "on the meta device" if parameter.is_meta else how
        if how:
            raise ValueError(f"liger.verify: {name} is {how}: verify the model where its weights are whole")


@contextmanager
def _left_as_found(model: nn.Module, parts: list[_Part]) -> Iterator[None]:
    """In training mode and eagerly, without reentrant checkpoints: `torch.autograd.grad` cannot pass them."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]
    checkpoints: dict[Any, Any] = {module: vars(module).get("_gradient_checkpointing_func") for module in modes}
    reentrant = {module: f for module, f in checkpoints.items() if getattr(f, "keywords", {}).get("use_reentrant")}
    try:
        if not model.training:
            model.train()
        for module, checkpoint in reentrant.items():
            keywords = {**checkpoint.keywords, "use_reentrant": False}
            module._gradient_checkpointing_func = functools.partial(checkpoint.func, **keywords)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _switch(parts, parts)
        for module, checkpoint in reentrant.items():
            module._gradient_checkpointing_func = checkpoint
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _switch(parts: list[_Part], patched: list[_Part]) -> None:
    for part in parts:
        part.switch(patched=part in patched)


def _compare(model: nn.Module, parts: list[_Part], inputs: Mapping[str, Any] | None, seed: int) -> Verification:
    def compared_with(patched: list[_Part]) -> list[Compared]:
        _switch(parts, patched)
        return list(map(Compared, yardstick.names, yardstick.distances(), yardstick.rounding))

    rounding = {module for part in parts for module in part.rounding()}
    for attempt in range(2):
        _switch(parts, [])
        tokens = _random_tokens(model, seed + attempt) if inputs is None else inputs
        yardstick = Yardstick(model, tokens, rounding, seed + attempt)
        compared = compared_with(parts)
        same = all(c.same for c in compared)
        if same:
            break
    suspects = [] if same else [p.label for p in parts if not all(c.same for c in compared_with([p]))]
    weight = next(model.parameters())
    return Verification(
        subject=f"{type(model).__name__} in {str(weight.dtype).removeprefix('torch.')} on {weight.device}",
        compared=tuple(sorted(compared, key=lambda c: c.error / c.rounding, reverse=True)),
        suspects=tuple(suspects),
        unreached=tuple(n for part in parts for n, module in part.modules.items() if module in yardstick.unreached),
        repeated=same and attempt > 0,
    )


def _random_tokens(model: Any, seed: int) -> dict[str, Tensor]:
    """Token ids that mean nothing special to the model, and labels, a quarter of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    text = model.config.get_text_config()
    plain = torch.ones(text.vocab_size)
    for name, value in {**model.config.to_dict(), **text.to_dict()}.items():
        for token in value if isinstance(value, list) else [value]:
            if name.endswith(("_token_id", "_token_index")) and token is not None and token < text.vocab_size:
                plain[token] = 0
    ids = torch.multinomial(plain, _ROWS * _LENGTH, replacement=True, generator=generator).view(_ROWS, _LENGTH)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.25, -100)
    device = next(model.parameters()).device
    return {"input_ids": ids.to(device), "labels": labels.to(device)}
