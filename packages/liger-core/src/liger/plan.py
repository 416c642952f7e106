"""What of a model would be swapped, what not, and why. `plan` changes nothing; `patch` carries it out."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from liger.adapter import Adapter
from liger.known_code import foreign_class, foreign_forward, foreign_function, foreign_method
from liger.subclass import (
    FUSED,
    Swappable,
    function_class,
    head_class,
    helpers,
    holds_what_it_wraps,
    layer_class,
    model_class,
    names_of,
    parallel_head_class,
    recompute_class,
)
from liger.switches import DEFAULTS, Part, Switches, matches

if TYPE_CHECKING:
    from liger.causal_lm import CausalLM

_RECOMPUTES = "the outputs of its norms and gated activations are not kept, but computed again in backward"


class Swapped(NamedTuple):
    """One module that runs a kernel: its name in the model, its class, and what it runs."""

    name: str
    kind: Part
    cls: str
    runs: str


class Declined(NamedTuple):
    """One module that keeps its own forward, and why."""

    name: str
    kind: Part
    cls: str
    reason: str


class Swap(NamedTuple):
    """A module, its class, and the subclass of it that runs the kernel. It does not keep the module alive."""

    module: weakref.ref[nn.Module]
    before: type[nn.Module]
    after: type[nn.Module]


@dataclass
class Plan:
    """What `apply` would do to a model. Print it."""

    swapped: list[Swapped] = field(default_factory=list)
    """The modules that run a kernel."""
    declined: list[Declined] = field(default_factory=list)
    """Those that a kernel is meant for, and that keep their own forward."""
    already: list[str] = field(default_factory=list)
    """Names of modules that an earlier `apply` has swapped; they are left alone."""
    _already: set[Part] = field(default_factory=set, repr=False)
    _swaps: list[Swap] = field(default_factory=list, repr=False)
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False)

    def __str__(self) -> str:
        lines = []
        width = max((len(kind) for _, kind, *_ in (*self.swapped, *self.declined)), default=0)
        for (kind, cls, runs), count in Counter((s.kind, s.cls, s.runs) for s in self.swapped).items():
            lines.append(f"  {kind:{width}}  {count} × {cls} → {runs}")
        for (kind, cls, reason), count in Counter((d.kind, d.cls, d.reason) for d in self.declined).items():
            lines.append(f"  {kind:{width}}  {count} × {cls} declined: {reason}")
        if self.already:
            lines.append(f"  {len(self.already)} modules had been patched before and were left as they are")
        return "\n".join([f"liger.{type(self).__name__}", *(lines or ["  nothing to swap"])])


class _Proposal(NamedTuple):
    """To swap one module for `subclass(its class, recipe)`, unless there is a reason against it."""

    name: str
    module: nn.Module
    kind: Part
    cls: str
    runs: str
    reason: str | None
    subclass: Callable[..., type[nn.Module]]
    recipe: Any


def plan(model: nn.Module, adapters: Iterable[Adapter], switches: Switches = DEFAULTS) -> Plan:
    """What `liger.apply` would do to `model` with these adapters. Changes nothing.

    The model may be on the meta device: no weight is read. `liger.discover.adapters_for(model)` has the installed
    adapters that it needs, and raises where there is none.

    Returns:
        The Plan: print it, or read its `swapped` and `declined`. What was asked for by name and can be applied nowhere
        is an error in `apply` only; here it stands among the declined.

    Raises:
        ValueError: a pattern of `skip` matches no module that a kernel is meant for.
    """
    found = Plan(_model=weakref.ref(model))
    planned: dict[nn.Module, type[nn.Module]] = {}
    for adapter in adapters:
        for name, module in model.named_modules():
            _add(found, planned, _kernels(adapter, name, module, type(_holder(model, name)), switches))
    if switches.loss:
        _add(found, planned, _unnamed_losses(model, found, switches))
    if switches.recompute:
        _add(found, planned, _recompute(model, switches, planned))
    names = {*found.already, *(s.name for s in found.swapped), *(d.name for d in found.declined)}
    for pattern in switches.skip:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(f"liger.apply: skip={pattern!r} matches no module that a kernel is meant for")
    return found


def _holder(model: nn.Module, name: str) -> nn.Module:
    """The module that holds the one of that name, or that held it before PEFT wrapped it."""
    holder, name = model, name.rpartition(".")[0]
    while name:
        holder = model.get_submodule(name)
        name = name.rpartition(".")[0]
        of_peft = model.get_submodule(name) if isinstance(holder, nn.ModuleDict) else holder
        if not type(of_peft).__module__.startswith("peft."):
            break
    return holder


def _add(found: Plan, planned: dict[nn.Module, type[nn.Module]], proposals: Iterable[_Proposal]) -> None:
    for name, module, kind, cls, runs, reason, subclass, recipe in proposals:
        if reason is None and module in planned:
            reason = "its class is swapped for another part already"
        if isinstance(module, Swappable):
            found.already.append(name)
            found._already.add(kind)
        elif reason is not None:
            found.declined.append(Declined(name, kind, cls, reason))
        else:
            planned[module] = subclass(type(module), recipe)
            found.swapped.append(Swapped(name, kind, cls, runs))
            found._swaps.append(Swap(weakref.ref(module), type(module), planned[module]))


def _kernels(adapter: Adapter, name: str, module: nn.Module, parent: type, switches: Switches) -> Iterator[_Proposal]:
    """What `adapter` says about this one module."""
    for target, cls, layer in adapter.layers_of(type(module), parent):
        if getattr(switches, layer.kind):
            reason = switches.skipped(name) or foreign_class(cls, target, adapter.modeling)
            for method in (layer.method, *helpers(cls, layer.method)):
                reason = reason or foreign_method(module, cls, method)
            reason = reason or layer.declines(module)
            runs = repr(layer) if reason else layer.kernel(module)
            yield _Proposal(name, module, layer.kind, target, runs, reason, layer_class, layer)
    ours: list[Any] = [c for c in type(module).__mro__ if c.__module__ == adapter.modeling]
    for cls in (c for c in ours if not issubclass(c, Swappable)):
        if switches.rope:
            yield from _rope(adapter, name, module, cls, switches)
        for spec in adapter.heads:
            if cls.__name__ == spec.model and switches.loss:
                yield from _loss(spec, name, module, cls, switches)


def _rope(
    adapter: Adapter, name: str, module: nn.Module, cls: type[nn.Module], switches: Switches
) -> Iterator[_Proposal]:
    named = _names_in(cls)
    used = {function: op for function, op in adapter.functions.items() if function in named}
    replaced = foreign_method(module, cls, "forward")
    if not used and (replaced is None or "Attention" not in cls.__name__):
        return
    ops = tuple((function, op) for function, op in used.items() if not isinstance(op, str))
    reason = switches.skipped(name) or replaced or _wrapped(cls)
    for function, op in used.items():
        reason = reason or foreign_function(getattr(adapter.module(), function), op, adapter.modeling)
    runs = ", ".join(op.__name__ for _, op in ops)
    yield _Proposal(name, module, "rope", cls.__name__, runs, reason, function_class, ops)


def _loss(spec: CausalLM, name: str, model: nn.Module, cls: type[nn.Module], switches: Switches) -> Iterator[_Proposal]:
    declined = switches.skipped(name) or foreign_method(model, cls, "forward") or spec.declines(model)
    runs = "cross_entropy of the logits"
    if switches.loss == "linear" and declined is None:
        for head_name, head in spec.heads(model).items():
            path = f"{name}.{head_name}".lstrip(".")
            reason = switches.skipped(path) or spec.head_declines(head) or foreign_forward(nn.Linear)
            if reason is None:
                runs = "the loss of its head"
            subclass = parallel_head_class if reason is None and "forward" in vars(head) else head_class
            yield _Proposal(path, head, "loss", type(head).__name__, FUSED, reason, subclass, spec)
    yield _Proposal(name, model, "loss", cls.__name__, runs, declined, model_class, spec)


def _unnamed_losses(model: nn.Module, found: Plan, switches: Switches) -> Iterator[_Proposal]:
    """The models with a head and a loss of transformers' of which no adapter speaks, as of one that takes images.

    The head may be that of a language model inside, which is asked for its logits then.
    """
    from transformers import PreTrainedModel

    named = {*found.already, *(s.name for s in found.swapped), *(d.name for d in found.declined)}
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or name in named:
            continue
        if module.can_generate() and module.get_output_embeddings() is not None:
            reason = switches.skipped(name) or "no adapter names this class, so that its loss takes the whole logits"
            yield _Proposal(name, module, "loss", type(module).__name__, "", reason, model_class, None)


def _recompute(model: nn.Module, switches: Switches, planned: dict[nn.Module, type[nn.Module]]) -> Iterator[_Proposal]:
    """The backbones: the innermost transformers models that hold a module which runs a Layer."""
    from transformers import PreTrainedModel

    backbones: dict[str, Any] = {}
    for name, module in model.named_modules():
        cls = planned.get(module, type(module))
        if issubclass(cls, Swappable) and cls._recipe[0] is layer_class:
            parents = ["", *itertools.accumulate(name.split(".")[:-1], "{}.{}".format)]
            owners = [parent for parent in parents if isinstance(model.get_submodule(parent), PreTrainedModel)]
            if owners:
                backbones[owners[-1]] = model.get_submodule(owners[-1])
    for name, backbone in backbones.items():
        reason = switches.skipped(name) or foreign_method(backbone, type(backbone), "forward")
        cls_name = type(backbone).__name__
        yield _Proposal(name, backbone, "recompute", cls_name, _RECOMPUTES, reason, recompute_class, None)


def _names_in(cls: type[nn.Module]) -> set[str]:
    """The names that the class's own forward uses, looked at behind its decorators."""
    return names_of(vars(cls).get("forward"))


def _wrapped(cls: type[nn.Module]) -> str | None:
    """Why the globals of the class's forward cannot be replaced: they are out of reach behind a decorator."""
    reached = holds_what_it_wraps(vars(cls)["forward"])
    return None if reached else f"{cls.__name__}.forward is wrapped by a decorator that does not show what it wraps"
