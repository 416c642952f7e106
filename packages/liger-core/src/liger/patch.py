"""`apply` and `undo`, the only place that changes a model: a module's class is swapped for a subclass of its own.

What is swapped is decided in `plan`; what that subclass is stands in `subclass`. Nothing outside the model changes.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType

from torch import nn

from liger.adapter import Adapter
from liger.disabled import DISABLED
from liger.discover import adapters_for
from liger.known_code import described
from liger.plan import Plan, Swapped, plan
from liger.subclass import FUSED, Swappable, model_class, parallel_head_class, recompute_class, swapped_class
from liger.switches import LINEAR, TRUE, Loss, Switches

_log = logging.getLogger(__name__)

_originals: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The modules whose class `apply` has swapped, at any time. A copy of one is not among them."""

_LiveSwap = tuple[nn.Module, type[nn.Module], type[nn.Module]]
"""A module, its own class, and the subclass of it that runs the kernel."""


class Patch(Plan):
    """What `apply` did to a model. Print it; undo it; or use it as a context manager, which undoes it at the end."""

    _undone = False

    def __str__(self) -> str:
        if DISABLED:
            return "liger.Patch\n  nothing is swapped: LIGER_DISABLE is set"
        return f"{super().__str__()}\n  undone since" if self._undone else super().__str__()

    def undo(self) -> None:
        """Give every module its class back, and every copy of one that has come into the model since, as by PEFT.

        Of a model that is itself a copy of a patched one, or was unpickled, the first Patch undoes all. Undoing twice
        is harmless. The Patch does not keep the model alive: what is gone needs no undoing.

        Raises:
            RuntimeError: a module's class was changed by something else since, or its method replaced on the instance,
                which may call the kernel's; nothing is undone then.
        """
        swapped = self._alive() + self._copies()
        left_over = [(module, name) for module, _, after in swapped for name in _methods_left_on(module, after)]
        for module, before, after in swapped:
            if type(module) is not after:
                raise RuntimeError(
                    f"cannot undo: a {before.__name__} was swapped by liger.apply and has become "
                    f"{type(module).__module__}.{type(module).__qualname__} since"
                )
        for module, name in left_over:
            delattr(module, name)
        for module, before, _ in swapped:
            module.__class__ = before
        self._swaps.clear()
        self._model = None
        self._undone = True

    def _alive(self) -> list[_LiveSwap]:
        found = ((swap.module(), swap) for swap in self._swaps)
        return [(module, swap.before, swap.after) for module, swap in found if module is not None]

    def _copies(self) -> list[_LiveSwap]:
        """The patched modules of the model that are nobody's: copies. With another Patch's beside them, only ours."""
        model = None if self._model is None else self._model()
        if model is None:
            return []
        patched = [module for module in model.modules() if isinstance(module, Swappable)]
        own, after = {module for module, *_ in self._alive()}, {swap.after for swap in self._swaps}
        shared = any(module in _originals and module not in own for module in patched)
        copies = ((module, swapped_class(type(module))) for module in patched if module not in _originals)
        return [(module, cls._recipe[1], cls) for module, cls in copies if not shared or cls in after]

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.undo()


def _methods_left_on(module: nn.Module, after: type[nn.Module]) -> list[str]:
    """The class's own methods that an instance holds, as accelerate's hooks leave them when they are taken off.

    Raises:
        RuntimeError: it holds another in the place of one. A model's own forward may be wrapped: it works for the stock
            class too.
    """
    found = []
    for name in vars(after).keys() & vars(module).keys():
        held = vars(module)[name]
        if getattr(held, "__func__", None) is vars(after)[name]:
            found.append(name)
        elif after._recipe[0] not in (model_class, recompute_class, parallel_head_class):  # type: ignore[attr-defined]
            raise RuntimeError(
                f"cannot undo: the {name} of a {after.__name__} was replaced on the instance by {described(held)} "
                "since, which may call the kernel's: take that off first"
            )
    return found


def apply(
    model: nn.Module,
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    experts: bool = TRUE,
    loss: Loss = LINEAR,
    recompute: bool = False,
    skip: Sequence[str] = (),
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
        skip: modules that keep their own code, as shell-style patterns (`fnmatch`, case-sensitive) of their names in
            `model.named_modules()`: "model.layers.0.*". A pattern may leave out how a name begins, up to some dot:
            "mlp" means every module that is called so, and what wraps the model (PEFT, DistributedDataParallel) need
            not be spelled out.

    Returns:
        The Patch: what was swapped, what was declined and why, and `undo()`. With LIGER_DISABLE=1 in the environment
        it is empty.

    Raises:
        TypeError: `model` is no `torch.nn.Module`, or `skip` is one string.
        ValueError: `loss` is unknown, a kernel that was asked for can be applied nowhere, or a pattern of `skip`
            matches no module that a kernel is meant for.
        liger.NoAdapterError: no installed adapter knows the model; the message says what to install.
        liger.VersionRangeError: the installed transformers or liger-core is outside the adapter's range.
        liger.AdapterConflictError: two installed packages claim the same model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"liger.apply: model must be a torch.nn.Module, not {type(model).__name__}")
    adapters = [] if DISABLED else adapters_for(model)
    return apply_adapters(
        model, adapters, rope=rope, norm=norm, mlp=mlp, experts=experts, loss=loss, recompute=recompute, skip=skip
    )


def apply_adapters(
    model: nn.Module,
    adapters: Iterable[Adapter],
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    experts: bool = TRUE,
    loss: Loss = LINEAR,
    recompute: bool = False,
    skip: Sequence[str] = (),
) -> Patch:
    """`apply` with given adapters instead of the installed ones: its switches, its Patch, its ValueErrors."""
    switches = Switches(rope=rope, norm=norm, mlp=mlp, experts=experts, loss=loss, recompute=recompute, skip=skip)
    if DISABLED:
        return turned_off()
    patch = Patch(**vars(plan(model, adapters, switches)))
    _require(patch, switches)
    for module, _, after in patch._alive():
        module.__class__ = after
        _originals.add(module)
    _log_patch(patch, type(model).__name__, switches)
    return patch


@functools.cache  # so that the warning comes once
def _warn_turned_off() -> None:
    _log.warning("LIGER_DISABLE is set: nothing is swapped, and the ops run their references")


def turned_off() -> Patch:
    """What `apply` returns where LIGER_DISABLE is set."""
    _warn_turned_off()
    return Patch()


def _log_patch(patch: Patch, model: str, switches: Switches) -> None:
    for name, _, cls, runs in patch.swapped:
        _log.debug("%s: %s → %s", name or "the model itself", cls, runs)
    for name, _, cls, reason in patch.declined:
        _log.debug("%s: %s declined: %s", name or "the model itself", cls, reason)
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(s.kind for s in patch.swapped).items())
    _log.info("%s: swapped %s; declined %d", model, kinds or "nothing", len(patch.declined))
    # The loss is what most of the memory is saved by.
    whole = [d for d in patch.declined if d.kind == "loss" and not switches.skipped(d.name)]
    if switches.loss == "linear" and whole and not _fused(patch):
        _log.warning(
            "%s: the head and its loss are not fused, because %s", model, "; ".join(sorted({d.reason for d in whole}))
        )


def _fused(planned: Plan) -> list[Swapped]:
    """The heads whose loss is one with them, but for those of a language model that another asks for its logits."""
    around = [d.name for d in planned.declined if d.kind == "loss"]
    fused = [s for s in planned.swapped if s.runs == FUSED]
    return [s for s in fused if not any(not name or s.name.startswith(f"{name}.") for name in around)]


def _require(planned: Plan, switches: Switches) -> None:
    """Raise for a kernel that was asked for by name and can be applied nowhere."""
    for kind, switch in switches.asked_by_name().items():
        done = [s for s in planned.swapped if s.kind == kind]
        if switch == "linear":
            done = _fused(planned)
        if not done and kind not in planned._already:
            reasons = sorted({f"{d.cls}: {d.reason}" for d in planned.declined if d.kind == kind})
            raise ValueError(
                f"liger.apply: {kind}={switch!r} was asked for and can be applied nowhere: "
                + ("; ".join(reasons) or "the model's adapter has no such kernel")
            )
