"""The functions that users of Liger-Kernel know: `apply_liger_kernel_to_llama(...)`, made from an adapter."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from liger.adapter import Adapter
from liger.patch import LINEAR, TRUE, Patch, apply_adapters


class FuturePatch(Patch):
    """A patch of every model of a type that is built from now on, until it is undone."""

    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[tuple[type[nn.Module], bool, Any]] = []

    def hook(self, cls: type[nn.Module], then: Callable[[nn.Module], Patch]) -> None:
        """Call `then` with every instance of `cls` when its `__init__` has run."""
        own, stock = "__init__" in vars(cls), cls.__init__

        @functools.wraps(stock)
        def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
            stock(self, *args, **kwargs)
            then(self)

        cls.__init__ = init  # type: ignore[method-assign]
        self._hooks.append((cls, own, stock))

    def undo(self) -> None:
        """Build models as before. Those that were built patched stay so."""
        for cls, own, stock in self._hooks:
            if own:
                cls.__init__ = stock  # type: ignore[method-assign]
            else:
                del cls.__init__
        self._hooks.clear()

    def __str__(self) -> str:
        return "\n".join(["liger.Patch of models to be built", *(f"  {cls.__name__}" for cls, *_ in self._hooks)])


def apply_liger_kernel(adapter: Adapter, mlp: Literal["swiglu", "geglu"] = "swiglu") -> Callable[..., Patch]:
    """Make `apply_liger_kernel_to_<model>` for an adapter, with Liger-Kernel's parameters.

    The function takes a model, or none: then every model of that type that is built from then on is patched, until
    `undo()`. Its switches mean what those of `liger.apply` mean, an explicit True included.

    Args:
        adapter: what to apply.
        mlp: how the family calls its gated MLP's switch.
    """

    def apply(
        model: nn.Module | None = None,
        *,
        rope: bool = TRUE,
        rms_norm: bool = TRUE,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = TRUE,
        **gated: bool,
    ) -> Patch:
        if gated.keys() - {mlp}:
            raise TypeError(f"unexpected switch {', '.join(gated.keys() - {mlp})}; the MLP's is called {mlp}")
        if cross_entropy and fused_linear_cross_entropy:
            if fused_linear_cross_entropy is not TRUE:
                raise ValueError("cross_entropy and fused_linear_cross_entropy cannot both be True")
            fused_linear_cross_entropy = False
        linear = LINEAR if fused_linear_cross_entropy is TRUE else "linear"
        switches: dict[str, Any] = {
            "rope": rope,
            "norm": rms_norm,
            "mlp": gated.get(mlp, TRUE),
            "loss": linear if fused_linear_cross_entropy else "full" if cross_entropy else None,
        }
        if model is not None:
            return apply_adapters(model, [adapter], **switches)
        patch = FuturePatch()
        modeling = adapter.module()
        for name in modeling.__all__:
            cls = getattr(modeling, name)
            if issubclass(cls, nn.Module) and not name.endswith("PreTrainedModel"):
                # LlamaModel has no head to patch: what is asked for by name is asked of the model that has one.
                asked = switches if adapter.head and name == adapter.head.model else {**switches, "loss": None}
                patch.hook(cls, functools.partial(apply_adapters, adapters=[adapter], **asked))
        return patch

    parameters = list(inspect.signature(apply).parameters.values())
    gated_switch = inspect.Parameter(mlp, inspect.Parameter.KEYWORD_ONLY, default=TRUE, annotation=bool)
    signature = inspect.Signature([*parameters[:3], gated_switch, *parameters[3:-1]], return_annotation=Patch)
    apply.__signature__ = signature  # type: ignore[attr-defined]
    apply.__name__ = apply.__qualname__ = f"apply_liger_kernel_to_{adapter.key}"
    apply.__doc__ = (
        f"Put the kernels into a {adapter.key} model, or into every one that is built from now on.\n\n"
        "As `liger.apply`, with Liger-Kernel's names; `cross_entropy` and `fused_linear_cross_entropy` exclude each "
        "other.\n\nReturns the Patch, whose `undo()` takes them out again.\n"
    )
    return apply
