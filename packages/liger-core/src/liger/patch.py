"""`apply`, and the only place that changes a model: a module's class is swapped for a subclass of its own class.

The subclass keeps name, module and signature and replaces `forward`, so that isinstance, state_dict, hooks, gradient
checkpointing, FSDP and PEFT see what they saw before. Nothing outside the model changes.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from liger.adapter import Adapter, Kind, Layer
from liger.discover import adapters_for

if TYPE_CHECKING:
    from liger.causal_lm import CausalLM

Loss = Literal["linear", "full"] | None


class Swapped(NamedTuple):
    """One module that runs a kernel now: its name in the model, its class, and what it runs."""

    name: str
    kind: Kind
    cls: str
    runs: str


class Declined(NamedTuple):
    """One module that keeps its own forward, and why."""

    name: str
    kind: Kind
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
        for (kind, cls, runs), count in Counter((s.kind, s.cls, s.runs) for s in self.swapped).items():
            lines.append(f"  {kind:4}  {count} × {cls} → {runs}")
        for (kind, cls, reason), count in Counter((d.kind, d.cls, d.reason) for d in self.declined).items():
            lines.append(f"  {kind:4}  {count} × {cls} declined: {reason}")
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


def apply(model: nn.Module, *, rope: bool = TRUE, norm: bool = TRUE, mlp: bool = TRUE, loss: Loss = LINEAR) -> Patch:
    """Put the kernels into a Hugging Face model that is already built, found by the classes it is made of.

    A switch that is left out is applied wherever it can be, and what cannot be is reported. One that is passed must be
    applied somewhere, or nothing is changed and ValueError says why.

    Args:
        model: a transformers model, or anything that holds one (PeftModel, DistributedDataParallel, …).
        rope: rotary position embeddings.
        norm: the norms.
        mlp: the gated activations of the MLPs.
        loss: "linear", the head and its loss in one, without the whole logits; "full", the model's logits with a fused
            cross entropy; None, the model's own loss.

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
    return apply_adapters(model, adapters_for(model), rope=rope, norm=norm, mlp=mlp, loss=loss)


def apply_adapters(
    model: nn.Module,
    adapters: list[Adapter],
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    loss: Loss = LINEAR,
) -> Patch:
    """`apply` with given adapters instead of the installed ones."""
    if loss not in ("linear", "full", None):
        raise ValueError(f"liger.apply: loss must be 'linear', 'full' or None, not {loss!r}")
    switches: dict[Kind, Any] = {"rope": rope, "norm": norm, "mlp": mlp, "loss": loss}
    patch = Patch()
    for adapter in adapters:
        for name, module in model.named_modules():
            _plan(patch, adapter, name, module, switches)
    _require(patch, switches)
    for swap in patch._swaps:
        swap.module.__class__ = swap.after
    return patch


def _plan(patch: Patch, adapter: Adapter, name: str, module: nn.Module, switches: Mapping[Kind, Any]) -> None:
    """Add to `patch` what `adapter` would do to this one module."""
    modeling = adapter.module()
    classes: list[Any] = [c for c in type(module).__mro__ if c.__module__ == adapter.modeling]
    for cls in classes:
        if issubclass(cls, _Swappable):
            continue
        layer = adapter.modules.get(cls.__name__)
        if layer is not None and switches[layer.kind]:
            reason = _overridden(module, cls) or layer.declines(module)
            _record(patch, name, module, layer.kind, cls, repr(layer), reason, _layer_class, layer)
        used = [f for f in adapter.functions if f in _names_in(cls)] if switches["rope"] else []
        if used:
            ops = tuple((f, adapter.functions[f]) for f in used)
            runs = ", ".join(op.__name__ for _, op in ops)
            reason = _overridden(module, cls) or _wrapped(cls)
            for f, op in ops:
                reason = reason or _differs(getattr(modeling, f), op, adapter.modeling)
            _record(patch, name, module, "rope", cls, runs, reason, _function_class, ops)
        if adapter.head is not None and cls.__name__ == adapter.head.model and switches["loss"]:
            _plan_loss(patch, adapter.head, name, module, cls, switches["loss"])


def _plan_loss(patch: Patch, spec: CausalLM, name: str, model: nn.Module, cls: type[nn.Module], loss: Any) -> None:
    declined = _overridden(model, cls) or spec.declines(model)
    head = getattr(model, spec.head, None)
    head_name = f"{name}.{spec.head}".lstrip(".")
    runs = "cross_entropy of the logits"
    if loss == "linear" and declined is None and head is not None:
        reason = spec.head_declines(model)
        if reason is None:
            runs = "the loss of its head"
        _record(patch, head_name, head, "loss", type(head), _FUSED, reason, _head_class, spec)
    _record(patch, name, model, "loss", cls, runs, declined, _model_class, spec)


def _record(
    patch: Patch,
    name: str,
    module: nn.Module,
    kind: Kind,
    cls: type[nn.Module],
    runs: str,
    reason: str | None,
    subclass: Callable[..., type[nn.Module]],
    recipe: Any,
) -> None:
    """Note that the module is swapped for `subclass(its class, recipe)`, or why not."""
    if isinstance(module, _Swappable):
        patch.already.append(name)
    elif reason is not None:
        patch.declined.append(Declined(name, kind, cls.__name__, reason))
    else:
        patch.swapped.append(Swapped(name, kind, cls.__name__, runs))
        patch._swaps.append(_Swap(module, type(module), subclass(type(module), recipe)))


def _require(patch: Patch, switches: Mapping[Kind, Any]) -> None:
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


def _overridden(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why the forward that `module` runs is not the one that `cls` was known by."""
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    definer = next(c for c in type(module).__mro__ if "forward" in vars(c))
    if definer is not cls and issubclass(definer, cls) and not issubclass(definer, _Swappable):
        return f"{definer.__module__}.{definer.__qualname__} overrides its forward"
    return None


def _names_in(cls: type[nn.Module]) -> tuple[str, ...]:
    """The global names that the class's own forward uses, looked at behind its decorators."""
    forward = vars(cls).get("forward")
    return inspect.unwrap(forward).__code__.co_names if isinstance(forward, FunctionType) else ()


def _wrapped(cls: type[nn.Module]) -> str | None:
    """Why the globals of the class's forward cannot be replaced: a decorator holds the function that uses them."""
    forward = vars(cls)["forward"]
    return None if inspect.unwrap(forward) is forward else f"{cls.__name__}.forward is wrapped by a decorator"


def _differs(function: Any, op: Callable[..., Any], modeling: str) -> str | None:
    """Why `op` may not stand for `function`, or None."""
    if not isinstance(function, FunctionType) or function.__module__ != modeling:
        return f"{modeling} holds {function!r} in its own function's place"
    theirs, ours = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (function, op))
    return None if theirs == ours else f"{function.__name__} takes {theirs}, {op.__name__} takes {ours}"


class _Swappable:
    """Marks the classes that `apply` swaps in; copies and pickles their instances as what they are."""

    _recipe: tuple[Callable[..., type[nn.Module]], type[nn.Module], Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_instance, self._recipe, *reduced[2:])


def _new_instance(subclass: Callable[..., type[nn.Module]], base: type[nn.Module], recipe: Any) -> nn.Module:
    cls = subclass(base, recipe)
    return cls.__new__(cls)


def _subclass(base: type[nn.Module], members: dict[str, Any], recipe: Any) -> type[nn.Module]:
    """A subclass of `base` that answers to its name; `recipe` makes an instance of it in another process."""
    identity = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (_Swappable, base), {**identity, **members, "_recipe": recipe})


@functools.cache
def _layer_class(base: Any, layer: Layer) -> type[nn.Module]:
    compute = layer.forward

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compute(self, *args, *kwargs.values())

    return _subclass(base, {"forward": forward}, (_layer_class, base, layer))


@functools.cache
def _function_class(base: Any, ops: tuple[tuple[str, Callable[..., Any]], ...]) -> type[nn.Module]:
    stock: Any = base.forward
    # The same code over a copy of its module's globals in which only the named functions differ.
    forward = FunctionType(
        stock.__code__, {**stock.__globals__, **dict(ops)}, stock.__name__, stock.__defaults__, stock.__closure__
    )
    forward.__kwdefaults__ = stock.__kwdefaults__
    functools.update_wrapper(forward, stock)
    return _subclass(base, {"forward": forward}, (_function_class, base, ops))


@functools.cache
def _model_class(base: Any, spec: CausalLM) -> type[nn.Module]:
    return _subclass(base, spec.model_members(base), (_model_class, base, spec))


@functools.cache
def _head_class(base: Any, spec: CausalLM) -> type[nn.Module]:
    return _subclass(base, spec.head_members(base), (_head_class, base, spec))
