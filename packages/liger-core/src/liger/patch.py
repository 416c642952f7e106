"""`apply` and `undo`, the only place that changes a model: a module's class is swapped for a subclass of its own.

What is swapped is decided in `plan`; what that subclass is stands in `subclass`. Nothing outside the model changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

from torch import nn

from liger.adapter import Adapter
from liger.discover import adapters_for
from liger.plan import FUSED, Plan, plan
from liger.switches import LINEAR, TRUE, Loss, Switches


class Patch(Plan):
    """What `apply` did to a model. Print it; undo it; or use it as a context manager, which undoes it at the end."""

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
    adapters: Iterable[Adapter],
    *,
    rope: bool = TRUE,
    norm: bool = TRUE,
    mlp: bool = TRUE,
    experts: bool = TRUE,
    loss: Loss = LINEAR,
    recompute: bool = False,
) -> Patch:
    """`apply` with given adapters instead of the installed ones."""
    switches = Switches(rope=rope, norm=norm, mlp=mlp, experts=experts, loss=loss, recompute=recompute)
    patch = Patch(**vars(plan(model, adapters, switches)))
    _require(patch, switches)
    for swap in patch._swaps:
        swap.module.__class__ = swap.after
    return patch


def _require(planned: Plan, switches: Switches) -> None:
    """Raise for a kernel that was asked for by name and can be applied nowhere."""
    if planned.already:
        return
    for kind, switch in switches.asked_by_name().items():
        done = [s for s in planned.swapped if s.kind == kind]
        if switch == "linear":
            done = [s for s in done if s.runs == FUSED]
        if not done:
            reasons = sorted({f"{d.cls}: {d.reason}" for d in planned.declined if d.kind == kind})
            raise ValueError(
                f"liger.apply: {kind}={switch!r} was asked for and can be applied nowhere: "
                + ("; ".join(reasons) or "the model's adapter has no such kernel")
            )
