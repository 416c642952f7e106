"""Whether a module runs the code that its adapter was written for, and if not, who has put what in its place.

An instance may have a method of its own, a subclass may override one, and another library may have replaced a method, a
function or a whole class of transformers for every model of the process.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from liger.subclass import Swappable, names_of


def foreign_method(module: nn.Module, cls: type[nn.Module], method: str) -> str | None:
    """Why the `method` that `module` runs is not the one that `cls` was known by, or None."""
    if method in vars(module):
        return f"its {method} was replaced on the instance by {described(vars(module)[method])}"
    definer = next((c for c in type(module).__mro__ if method in vars(c)), None)
    if definer is None or issubclass(definer, Swappable):
        return None
    if definer is not cls and issubclass(definer, cls):
        return f"{definer.__module__}.{definer.__qualname__} overrides its {method}"
    return foreign_forward(definer, method)


def foreign_forward(cls: type, method: str = "forward") -> str | None:
    """Why the `method` that `cls` itself has is not the one that it was written with, or None."""
    function: Any = vars(cls)[method]
    if _package(_defined_in(function)) in (_package(cls.__module__), "torch"):
        return None
    return f"{cls.__qualname__}.{method} was replaced by {described(function)}"


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""The attributes in which a module keeps its hooks."""

HOOKS_ON_ALL: tuple[dict[int, Any], ...] = tuple(getattr(nn.modules.module, f"_global{kind}", {}) for kind in HOOKS)
"""Those on every module of the process; private, so that there may be none."""


def foreign_class(cls: type, name: str, modeling: str) -> str | None:
    """Why `cls`, which `modeling` has under that name, is not the class that it had there, or None."""
    if "." in name or _package(cls.__module__) == _package(modeling):
        return None
    return f"{modeling} holds {cls.__module__}.{cls.__qualname__} in its own class's place"


def foreign_function(function: Any, op: Callable[..., Any] | str, modeling: str) -> str | None:
    """Why `op` may not stand for `function`, or None."""
    if isinstance(op, str):
        return f"{function.__name__} {op}"
    is_own = isinstance(function, FunctionType) and function.__module__ == modeling
    if not is_own or _is_foreign(function, modeling):
        return f"{modeling} holds {described(function)} in its own function's place"
    for name in sorted(names_of(function)):
        called = function.__globals__.get(name)
        if callable(called) and not isinstance(called, type) and _is_foreign(called, modeling):
            return f"{function.__name__} calls {described(called)} in the place of {modeling}'s own {name}"
    theirs, ours = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in (function, op))
    return None if theirs == ours else f"{function.__name__} takes {theirs}, {op.__name__} takes {ours}"


def foreign_global(module: ModuleType, name: str) -> str | None:
    """Why `module`'s function of that name is not the one that was written there, or None."""
    function = getattr(module, name)
    if _defined_in(function) == module.__name__:
        return None
    return f"{module.__name__} holds {described(function)} in the place of its own {name}"


def _is_foreign(function: Any, modeling: str) -> bool:
    return _package(_defined_in(function)) not in (_package(modeling), "torch", "builtins")


def _package(module: str) -> str:
    return module.partition(".")[0]


def _defined_in(function: Any) -> str:
    """The module whose code really runs, whatever `functools.wraps` says: a kernel would leave the wrapper's out."""
    return getattr(function, "__globals__", {}).get("__name__") or type(function).__module__


def described(function: Any) -> str:
    """The name of what a bound method or a partial calls, behind the module that it stands in."""
    while isinstance(function, (functools.partial, MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return f"{_defined_in(function)}.{getattr(function, '__qualname__', type(function).__qualname__)}"
