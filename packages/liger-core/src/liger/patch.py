"""`apply`, and the only place that changes a model: a module's class is swapped for a subclass of its own class.

What that subclass is stands in `subclass`. Nothing outside the model changes.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from liger.adapter import Adapter, Kind
from liger.discover import adapters_for
from liger.subclass import (
    Swappable,
    function_class,
    head_class,
    layer_class,
    model_class,
    parallel_head_class,
    recompute_class,
)

if TYPE_CHECKING:
    from liger.causal_lm import CausalLM

Loss = Literal["linear", "full"] | None
Part = Kind | Literal["recompute"]


class Swapped(NamedTuple):
    """One module that runs a kernel now: its name in the model, its class, and what it runs."""

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


class _Swap(NamedTuple):
    module: nn.Module
    before: type[nn.Module]
    after: type[nn.Module]


@dataclass
class Patch:
    """What `apply` did to a model. Print it; undo it; or use it as a context manager, which undoes it at the end."""

    swapped: list[Swapped] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    """Names of modules that an earlier `apply` had swapped; this one left them alone."""
    _swaps: list[_Swap] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Give every module its class back. Undoing twice is harmless.

        Raises:
            RuntimeError: a module's class was changed by something else since; nothing is undone then.
        """
        for swap in self._swaps:
            if type(swap.module) is not swap.after:
                raise RuntimeError(
                    f"cannot undo: a {swap.before.__name__} was swapped by liger.apply and has become "
                    f"{type(swap.module).__module__}.{type(swap.module).__qualname__} since"
                )
        for swap in self._swaps:
            swap.module.__class__ = swap.before
        self._swaps.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = []
        width = max((len(kind) for _, kind, *_ in (*self.swapped, *self.declined)), default=0)
        for (kind, cls, runs), count in Counter((s.kind, s.cls, s.runs) for s in self.swapped).items():
            lines.append(f"  {kind:{width}}  {count} × {cls} → {runs}")
        for (kind, cls, reason), count in Counter((d.kind, d.cls, d.reason) for d in self.declined).items():
            lines.append(f"  {kind:{width}}  {count} × {cls} declined: {reason}")
        if self.already:
            lines.append(f"  {len(self.already)} modules had been patched before and were left as they are")
        return "\n".join(["liger.Patch", *(lines or ["  nothing to swap"])])


class _Default(int):
    """A True that nobody passed: the kernel is wanted where it can be had, and its absence is no error."""

    def __repr__(self) -> str:
        return "True"


class _DefaultLoss(str):
    """A "linear" that nobody passed: where the head declines it, "full" will do."""


TRUE: Any = _Default(1)
LINEAR: Any = _DefaultLoss("linear")
_FUSED = "linear_cross_entropy"
_RECOMPUTES = "the outputs of its norms and gated activations are not kept, but computed again in backward"


def apply(
    model: nn.Module,
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    experts: bool = TRUE,
    loss: Loss = LINEAR,
    recompute: bool = False,
) -> Patch:
    """Put the kernels into a Hugging Face model that is already built, found by the classes it is made of.

    A switch that is left out is applied wherever it can be, and what cannot be is reported. One that is passed must be
    applied somewhere, or nothing is changed and ValueError says why.

    Args:
        model: a transformers model, or anything that holds one (PeftModel, DistributedDataParallel, …).
        rope: rotary position embeddings.
        norm: the norms.
        mlp: the gated activations of the MLPs.
        experts: those of the mixtures of experts, inside transformers' own dispatch; router and auxiliary loss stay.
        loss: "linear", the head and its loss in one, without the whole logits; "full", the model's logits with a fused
            cross entropy; None, the model's own loss.
        recompute: keep less for backward: the norms' outputs and the MLPs' products are computed again (see
            `liger.recompute`). Has no effect in compiled code, in checkpointed layers, and inside saved-tensor hooks.

    Returns:
        The Patch: what was swapped, what was declined and why, and `undo()`.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
        ValueError: `loss` is unknown, or a kernel that was asked for can be applied nowhere.
        liger.NoAdapterError: no installed adapter knows the model; the message says what to install.
        liger.VersionRangeError: the installed transformers or liger-core is outside the adapter's range.
        liger.AdapterConflictError: two installed packages claim the same model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"liger.apply: model must be a torch.nn.Module, not {type(model).__name__}")
    return apply_adapters(
        model, adapters_for(model), rope=rope, norm=norm, mlp=mlp, experts=experts, loss=loss, recompute=recompute
    )


def apply_adapters(
    model: nn.Module,
    adapters: list[Adapter],
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    experts: bool = TRUE,
    loss: Loss = LINEAR,
    recompute: bool = False,
) -> Patch:
    """`apply` with given adapters instead of the installed ones."""
    if loss not in ("linear", "full", None):
        raise ValueError(f"liger.apply: loss must be 'linear', 'full' or None, not {loss!r}")
    switches: dict[Part, Any] = {"rope": rope, "norm": norm, "mlp": mlp, "experts": experts, "loss": loss}
    switches["recompute"] = recompute
    patch = Patch()
    for adapter in adapters:
        for name, module in model.named_modules():
            parent = model.get_submodule(name.rpartition(".")[0])
            _plan(patch, adapter, name, module, type(parent), switches)
    if recompute:
        _plan_recompute(patch, model)
    _require(patch, switches)
    for swap in patch._swaps:
        swap.module.__class__ = swap.after
    return patch


def _plan(
    patch: Patch, adapter: Adapter, name: str, module: nn.Module, parent: type, switches: Mapping[Part, Any]
) -> None:
    """Add to `patch` what `adapter` would do to this one module."""
    for target, cls, layer in adapter.layers_of(type(module), parent):
        if switches[layer.kind]:
            reason = _overridden(module, cls, layer.method) or layer.declines(module)
            _record(patch, name, module, layer.kind, target, repr(layer), reason, layer_class, layer)
    ours: list[Any] = [c for c in type(module).__mro__ if c.__module__ == adapter.modeling]
    for cls in (c for c in ours if not issubclass(c, Swappable)):
        if switches["rope"]:
            _plan_rope(patch, adapter, name, module, cls)
        for spec in adapter.heads:
            if cls.__name__ == spec.model and switches["loss"]:
                _plan_loss(patch, spec, name, module, cls, switches["loss"])


def _plan_rope(patch: Patch, adapter: Adapter, name: str, module: nn.Module, cls: type[nn.Module]) -> None:
    named = _names_in(cls)
    used = {function: op for function, op in adapter.functions.items() if function in named}
    if not used:
        return
    ops = tuple((function, op) for function, op in used.items() if not isinstance(op, str))
    reason = _overridden(module, cls, "forward") or _wrapped(cls)
    for function, op in used.items():
        reason = reason or _differs(getattr(adapter.module(), function), op, adapter.modeling)
    runs = ", ".join(op.__name__ for _, op in ops)
    _record(patch, name, module, "rope", cls.__name__, runs, reason, function_class, ops)


def _plan_loss(patch: Patch, spec: CausalLM, name: str, model: nn.Module, cls: type[nn.Module], loss: Any) -> None:
    declined = _overridden(model, cls, "forward") or spec.declines(model)
    runs = "cross_entropy of the logits"
    if loss == "linear" and declined is None:
        for head_name, head in spec.heads(model).items():
            reason = spec.head_declines(head)
            if reason is None:
                runs = "the loss of its head"
            subclass = parallel_head_class if reason is None and "forward" in vars(head) else head_class
            path = f"{name}.{head_name}".lstrip(".")
            _record(patch, path, head, "loss", type(head).__name__, _FUSED, reason, subclass, spec)
    _record(patch, name, model, "loss", cls.__name__, runs, declined, model_class, spec)


def _plan_recompute(patch: Patch, model: nn.Module) -> None:
    """Add to `patch` the backbones: the innermost transformers models that hold a module which runs a Layer."""
    from transformers import PreTrainedModel

    planned = {swap.module: swap.after for swap in patch._swaps}
    backbones: dict[str, Any] = {}
    for name, module in model.named_modules():
        cls = planned.get(module, type(module))
        if issubclass(cls, Swappable) and cls._recipe[0] is layer_class:
            parents = ["", *itertools.accumulate(name.split(".")[:-1], "{}.{}".format)]
            owners = [parent for parent in parents if isinstance(model.get_submodule(parent), PreTrainedModel)]
            if owners:
                backbones[owners[-1]] = model.get_submodule(owners[-1])
    for name, backbone in backbones.items():
        cls, reason = type(backbone), _overridden(backbone, type(backbone), "forward")
        if backbone in planned:
            reason = "its class is swapped for another part already"
        _record(patch, name, backbone, "recompute", cls.__name__, _RECOMPUTES, reason, recompute_class, None)


def _record(
    patch: Patch,
    name: str,
    module: nn.Module,
    kind: Part,
    cls: str,
    runs: str,
    reason: str | None,
    subclass: Callable[..., type[nn.Module]],
    recipe: Any,
) -> None:
    """Note that the module is swapped for `subclass(its class, recipe)`, or why not."""
    if isinstance(module, Swappable):
        patch.already.append(name)
    elif reason is not None:
        patch.declined.append(Declined(name, kind, cls, reason))
    else:
        patch.swapped.append(Swapped(name, kind, cls, runs))
        patch._swaps.append(_Swap(module, type(module), subclass(type(module), recipe)))


def _require(patch: Patch, switches: Mapping[Part, Any]) -> None:
    """Raise for a kernel that was asked for by name and has been applied nowhere."""
    for kind, switch in switches.items():
        if not switch or isinstance(switch, (_Default, _DefaultLoss)) or patch.already:
            continue
        done = [s for s in patch.swapped if s.kind == kind]
        if switch == "linear":
            done = [s for s in done if s.runs == _FUSED]
        if not done:
            reasons = sorted({f"{d.cls}: {d.reason}" for d in patch.declined if d.kind == kind})
            raise ValueError(
                f"liger.apply: {kind}={switch!r} was asked for and can be applied nowhere: "
                + ("; ".join(reasons) or "the model's adapter has no such kernel")
            )


def _overridden(module: nn.Module, cls: type[nn.Module], method: str) -> str | None:
    """Why the `method` that `module` runs is not the one that `cls` was known by."""
    if method in vars(module):
        return f"its {method} was replaced on the instance"
    definer = next((c for c in type(module).__mro__ if method in vars(c)), cls)
    if definer is not cls and issubclass(definer, cls) and not issubclass(definer, Swappable):
        return f"{definer.__module__}.{definer.__qualname__} overrides its {method}"
    return None


def _names_in(cls: type[nn.Module]) -> tuple[str, ...]:
    """The global names that the class's own forward uses, looked at behind its decorators."""
    forward = vars(cls).get("forward")
    return inspect.unwrap(forward).__code__.co_names if isinstance(forward, FunctionType) else ()


def _wrapped(cls: type[nn.Module]) -> str | None:
    """Why the globals of the class's forward cannot be replaced: a decorator holds the function that uses them."""
    forward = vars(cls)["forward"]
    return None if inspect.unwrap(forward) is forward else f"{cls.__name__}.forward is wrapped by a decorator"


def _differs(function: Any, op: Callable[..., Any] | str, modeling: str) -> str | None:
    """Why `op` may not stand for `function`, or None."""
    if isinstance(op, str):
        return f"{function.__name__} {op}"
    if not isinstance(function, FunctionType) or function.__module__ != modeling:
        return f"{modeling} holds {function!r} in its own function's place"
    theirs, ours = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (function, op))
    return None if theirs == ours else f"{function.__name__} takes {theirs}, {op.__name__} takes {ours}"
