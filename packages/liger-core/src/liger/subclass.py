"""The classes that `liger.apply` swaps in: each a subclass of a module's own class that answers to its name.

It keeps name, module and signature, replaces what its kernel needs and adds to the repr, so that isinstance,
state_dict, hooks, gradient checkpointing, FSDP and PEFT see what they saw before.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import CellType, CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from liger.recompute import forward_in_region

if TYPE_CHECKING:
    from liger.adapter import Layer
    from liger.causal_lm import CausalLM


_ABSENT = object()
_OF_EVERY_MODULE = frozenset(dir(nn.Module))

FUSED = "linear_cross_entropy"
"""The op of a head that computes the loss."""


class Swappable:
    """Marks the classes that `apply` swaps in; copies and pickles their instances as what they are."""

    _recipe: tuple[Callable[..., type[nn.Module]], type[nn.Module], Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new_instance, self._recipe, *reduced[2:])


def swapped_class(cls: type[nn.Module]) -> Any:
    """The class of `apply` that `cls` is or derives from (FSDP derives one of its own)."""
    return next(c for c in cls.__mro__ if "_recipe" in vars(c))


def _new_instance(subclass: Callable[..., type[nn.Module]], base: type[nn.Module], recipe: Any) -> nn.Module:
    cls = subclass(base, recipe)
    return cls.__new__(cls)


def _subclass(
    base: type[nn.Module],
    members: dict[str, Any],
    recipe: Any,
    kernel: Callable[[nn.Module], str],
    stands_for: tuple[str, ...] = (),
) -> type[nn.Module]:
    """A subclass of `base` that answers to its name; `recipe` makes an instance of it in another process.

    Its repr says which kernel it runs. A method of `base` that somebody replaces later, for every model, runs instead
    of ours; so does the method that calls one which ours `stands_for`.
    """
    identity = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}

    def extra_repr(self: nn.Module) -> str:
        return ", ".join(filter(None, [base.extra_repr(self), f"liger={kernel(self)}"]))

    functions = {name: ours for name, ours in members.items() if isinstance(ours, FunctionType)}
    heeding = {name: _heeding(base, (name, *stands_for), ours) for name, ours in functions.items()}
    own = {**identity, **members, **heeding, "extra_repr": extra_repr, "_recipe": recipe}
    return type(base.__name__, (Swappable, base), own)


def _heeding(base: Any, names: tuple[str, ...], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`ours` with the signature of the first method of `base`, and as long as all are what they are now."""
    stock = [(name, getattr(base, name)) for name in names]

    @functools.wraps(stock[0][1])
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, known in stock:
            if getattr(base, name) is not known:
                return getattr(base, names[0])(self, *args, **kwargs)
        return ours(self, *args, **kwargs)

    return method


def _cached(make: Callable[[Any, Any], type[nn.Module]]) -> Callable[[Any, Any], type[nn.Module]]:
    """`make`, once for each base, recipe, and methods that the base has had where the subclass has its own."""
    made = functools.cache(lambda base, recipe, _: make(base, recipe))

    @functools.wraps(make)
    def subclass(base: Any, recipe: Any) -> type[nn.Module]:
        method = getattr(recipe, "method", "forward")
        return made(base, recipe, tuple(getattr(base, name) for name in (method, *helpers(base, method))))

    return subclass


@_cached
def layer_class(base: Any, layer: Layer) -> type[nn.Module]:
    """`base`, one of whose methods is the layer's."""
    stock, compute = getattr(base, layer.method), layer.forward
    theirs, ours = (list(inspect.signature(f).parameters)[1:] for f in (stock, compute))
    names = dict(zip(theirs, ours, strict=False))

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return compute(self, *args, **{names.get(name, name): value for name, value in kwargs.items()})

    recipe, stands_for = (layer_class, base, layer), helpers(base, layer.method)
    return _subclass(base, {layer.method: method}, recipe, layer.kernel, stands_for)


@_cached
def function_class(base: Any, ops: tuple[tuple[str, Callable[..., Any]], ...]) -> type[nn.Module]:
    """`base`, whose forward is the same code over globals of its own in which only `ops` differ from its module's."""
    stock, names = base.forward, ", ".join(op.__name__ for _, op in ops)
    own, follow = _globals_but_for(inspect.unwrap(stock), dict(ops))
    over = _over(stock, own)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            follow()
        return over(self, *args, **kwargs)

    return _subclass(base, {"forward": forward}, (function_class, base, ops), lambda _: names)


def _globals_but_for(function: Any, ops: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """A copy of the function's globals with `ops` in it, and what keeps it up with them.

    Whoever puts something else into the module is heard, in the place of what an op stands for too, or of what that
    calls.
    """
    theirs = function.__globals__
    own = {**theirs, **ops}
    behind = {name: {name, *names_of(theirs[name])} for name in ops}
    stock = {name: theirs.get(name, _ABSENT) for name in names_of(function).union(*behind.values())}
    seen = dict(stock)

    def follow() -> None:
        changed = [name for name, value in seen.items() if theirs.get(name, _ABSENT) is not value]
        if not changed:
            return
        for name in changed:
            seen[name] = own[name] = theirs.get(name, _ABSENT)
        for name, op in ops.items():
            own[name] = op if all(seen[known] is stock[known] for known in behind[name]) else seen[name]
        for name in changed:
            if own[name] is _ABSENT:
                del own[name]

    return own, follow


def names_of(function: Any) -> set[str]:
    """The names, of globals and of attributes, in a function's code behind its decorators; none of what has no code."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return set() if code is None else _names_in(code)


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def helpers(cls: type, method: str) -> tuple[str, ...]:
    """Other methods of the class that this one calls, as the forward of Gemma's norm calls `_norm`."""
    named = names_of(getattr(cls, method)) - {method, *_OF_EVERY_MODULE}
    return tuple(sorted(name for name in named if isinstance(getattr(cls, name, None), FunctionType)))


def _over(function: Any, own: dict[str, Any]) -> Any:
    """A copy of `function` whose globals are `own`; under its decorators, of what they hold."""
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__
    if inner is not None:
        held, own = CellType(_over(inner, own)), function.__globals__
        closure = tuple(held if _contents(cell) is inner else cell for cell in closure)
    copied = FunctionType(function.__code__, own, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copied, function)


def holds_what_it_wraps(function: Any) -> bool:
    """Whether each decorator of `function` is a function that has what it decorates in a variable of its closure."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        return isinstance(function, FunctionType)
    if not isinstance(function, FunctionType):
        return False
    return any(_contents(cell) is inner for cell in function.__closure__ or ()) and holds_what_it_wraps(inner)


def _contents(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not set
        return None


@_cached
def model_class(base: Any, spec: CausalLM) -> type[nn.Module]:
    """`base`, whose forward has its head compute the loss."""
    return _subclass(base, spec.model_members(base), (model_class, base, spec), lambda _: "loss")


@_cached
def head_class(base: Any, spec: CausalLM) -> type[nn.Module]:
    """`base`, which computes a loss where its model asks for one."""
    return _subclass(base, spec.head_members(base), (head_class, base, spec), lambda _: FUSED)


@_cached
def parallel_head_class(base: Any, spec: CausalLM) -> type[nn.Module]:
    """The same where the instance has a forward of transformers' tensor parallelism."""
    return _subclass(base, spec.parallel_head_members(), (parallel_head_class, base, spec), lambda _: FUSED)


@_cached
def recompute_class(base: Any, _: None) -> type[nn.Module]:
    """`base`, during whose forward autograd keeps no tensor that one cheap pass rebuilds."""
    return _subclass(
        base, {"forward": forward_in_region(base.forward)}, (recompute_class, base, None), lambda _: "recompute"
    )
