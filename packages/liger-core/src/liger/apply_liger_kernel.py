"""The functions that users of Liger-Kernel know: `apply_liger_kernel_to_llama(...)`, made from an adapter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import nn

from liger.adapter import Adapter
from liger.disabled import DISABLED
from liger.layers import Stock
from liger.patch import Patch, apply_adapters, turned_off
from liger.switches import LINEAR, TRUE


class _Hook(NamedTuple):
    """A class, the `__init__` that it was given, and its own, None where it inherits one."""

    cls: type[nn.Module]
    init: Callable[..., None]
    own: Any


class FuturePatch(Patch):
    """A patch of every model of a type that is built from now on, until it is undone."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[_Hook] = []

    def hook(self, cls: type[nn.Module], then: Callable[[nn.Module], Patch]) -> None:
        """Call `then` with every instance of `cls` when its `__init__` has run."""
        own, stock = "__init__" in vars(cls), cls.__init__

        @functools.wraps(stock)
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            then(self)

        cls.__init__ = init  # type: ignore[method-assign]
        self._hooks.append(_Hook(cls, init, stock if own else None))

    def undo(self) -> None:
        """Build models as before. Those that were built patched stay so.

        Raises:
            RuntimeError: an `__init__` was replaced by something else since (another such patch, say); nothing is
                undone then.
        """
        for cls, init, _ in self._hooks:
            if vars(cls).get("__init__") is not init:
                raise RuntimeError(f"cannot undo: {cls.__name__}.__init__ was replaced by something else since")
        for cls, _, own in self._hooks:
            if own is not None:
                cls.__init__ = own  # type: ignore[method-assign]
            else:
                del cls.__init__
        self._hooks.clear()

    def __str__(self) -> str:
        return "\n".join(["liger.Patch of models to be built", *(f"  {hook.cls.__name__}" for hook in self._hooks)])


def apply_liger_kernel(adapter: Adapter, mlp: Literal["swiglu", "geglu"] = "swiglu") -> Callable[..., Patch]:
    """Make `apply_liger_kernel_to_<model>` for an adapter, with Liger-Kernel's parameters.

    The function takes a model, or none: then every model of that type that is built from then on is patched, until
    `undo()`. Its switches mean what those of `liger.apply` mean, an explicit True included: it has those that the
    adapter has kernels for.

    Args:
        adapter: what to apply.
        mlp: how the family calls the switch of its gated activations, in MLPs and in experts.
    """
    kernels = {type(layer).__name__: layer.kind for layer in adapter.modules.values() if not isinstance(layer, Stock)}
    gated = sorted({"mlp", "experts"} & set(kernels.values()))
    norm = "layer_norm" if "LayerNorm" in kernels else "rms_norm"
    has = {"rope": any(not isinstance(op, str) for op in adapter.functions.values())}
    has |= {norm: "norm" in kernels.values(), mlp: bool(gated)}
    names: dict[str, Any] = {name: TRUE for name, is_there in has.items() if is_there}
    names |= {"cross_entropy": False, "fused_linear_cross_entropy": TRUE}

    def apply(model: nn.Module | None = None, **named: bool) -> Patch:
        if named.keys() - names.keys():
            unknown = ", ".join(sorted(named.keys() - names.keys()))
            raise TypeError(f"{apply.__name__}: unexpected switch {unknown}, expected of {', '.join(names)}")
        on = {**names, **named}
        switches: dict[str, Any] = {"rope": on.get("rope", TRUE), "norm": on.get(norm, TRUE)}
        switches |= {"loss": _loss(on), "mlp": TRUE}
        # One switch for two kinds: that each is applied somewhere cannot be asked, an MLP may be all experts.
        switches |= {kind: TRUE if on[mlp] and len(gated) > 1 else on[mlp] for kind in gated}
        if model is not None:
            return apply_adapters(model, [adapter], **switches)
        if DISABLED:
            return turned_off()
        patch = FuturePatch()
        modeling = adapter.module()
        heads = {head.model for head in adapter.heads}
        # A part of a model has no head to patch, and perhaps no norm: what is asked for is asked of the whole.
        of_a_part = {**{kind: TRUE if switch else switch for kind, switch in switches.items()}, "loss": None}
        for name in modeling.__all__:
            cls = getattr(modeling, name)
            if issubclass(cls, nn.Module) and not name.endswith("PreTrainedModel"):
                asked = switches if name in heads else of_a_part
                patch.hook(cls, functools.partial(apply_adapters, adapters=[adapter], **asked))
        return patch

    keyword = inspect.Parameter.KEYWORD_ONLY
    switches = [inspect.Parameter(name, keyword, default=on, annotation=bool) for name, on in names.items()]
    positional = next(iter(inspect.signature(apply).parameters.values()))
    apply.__signature__ = inspect.Signature([positional, *switches], return_annotation=Patch)  # type: ignore[attr-defined]
    apply.__name__ = apply.__qualname__ = f"apply_liger_kernel_to_{adapter.key}"
    apply.__doc__ = (
        f"Put the kernels into a {adapter.key} model, or into every one that is built from now on.\n\n"
        "As `liger.apply`, with Liger-Kernel's names; `cross_entropy` and `fused_linear_cross_entropy` exclude each "
        "other.\n\nReturns the Patch, whose `undo()` takes them out again.\n"
    )
    return apply


def _loss(on: dict[str, Any]) -> Any:
    """What Liger-Kernel's two switches of the loss mean to `liger.apply`."""
    linear = on["fused_linear_cross_entropy"]
    if not on["cross_entropy"]:
        return (LINEAR if linear is TRUE else "linear") if linear else None
    if linear and linear is not TRUE:
        raise ValueError("cross_entropy and fused_linear_cross_entropy cannot both be True")
    return "full"
