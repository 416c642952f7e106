"""What one forward of a model was asked for when labels are given, and what its head made of it.

The head computes the loss and hands on an empty placeholder for the logits (see `causal_lm`). The loss reaches the
placeholder and comes back out of it through autograd, so that backward enters the head through the head's output: FSDP
gathers a head of its own there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from liger.autocast import autocast_dtype, under_autocast
from liger.lazy_logits import LazyLogits, version
from liger.ops import cross_entropy, linear_cross_entropy
from liger.ops.vocab_parallel_cross_entropy import vocab_parallel_linear_cross_entropy
from liger.optimizer_steps import StepsSince
from liger.sharded_head import call_again, is_gathered, is_vocab_parallel, is_whole

StockLoss = Literal["ForCausalLMLoss", "ForMaskedLMLoss"]


def stock_loss_of(name: StockLoss) -> Callable[..., Tensor]:
    """One of the loss functions that this file knows; imported late, because liger itself needs no transformers."""
    from transformers.loss import loss_utils

    return getattr(loss_utils, name)


class AfterHead(NamedTuple):
    """What a model does to its head's output before it is the logits: a scale, a division, a softcap, in this order."""

    scale: float
    divisor: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        """The model's logits, rounded where the model rounds them."""
        if self.scale != 1:
            logits = logits * self.scale
        if self.divisor != 1:
            logits = logits / self.divisor
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class LossRequest:
    """What one forward of a model was asked for, and what its head made of it."""

    def __init__(
        self, labels: Tensor, loss: StockLoss, after_head: AfterHead, kwargs: dict[str, Any], known: set[str]
    ) -> None:
        self.labels = labels
        self.known = known
        self.known_loss = stock_loss_of(loss)
        self.after_head = after_head
        self.shifts = loss == "ForCausalLMLoss"
        self.shift_labels: Tensor | None = kwargs.get("shift_labels")
        self.num_items_in_batch: Tensor | int | None = kwargs.get("num_items_in_batch")
        self.ignore_index: int = kwargs.get("ignore_index", -100)
        self.loss: Tensor | None = None
        self.placeholder: Tensor | None = None
        self.recompute: Callable[[torch.dtype], Tensor] | None = None
        self.recompute_detached: Callable[[torch.dtype], Tensor] | None = None
        self.upstream = _Upstream()
        self.shape = torch.Size()

    def target(self) -> Tensor:
        """For each position its label or that of the next, flattened, as the model's own loss takes them."""
        if not self.shifts:
            return self.labels.reshape(-1)
        if self.shift_labels is not None:
            return self.shift_labels.reshape(-1)
        return F.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:].reshape(-1)

    def can_fuse(self, head: Any, hidden: Tensor) -> bool:
        """Whether the head's weight is one that an op may read, and there is a target for every hidden state."""
        readable = (is_whole(head) and type(hidden) in (Tensor, nn.Parameter)) or is_vocab_parallel(head, hidden)
        return readable and self.loss is None and self._fits(hidden)

    def _fits(self, rows: Tensor) -> bool:
        """Whether there is one label for every row, and one number to divide by."""
        labels, items = self.labels, self.num_items_in_batch
        if self.shifts and self.shift_labels is not None:
            labels = self.shift_labels
        scalar = items.numel() == 1 if isinstance(items, Tensor) else True
        return scalar and rows.shape[:-1].numel() == labels.numel()

    def _shaped(self, loss: Tensor) -> Tensor:
        """The loss in the shape that a division by the number of items gives it: nn.DataParallel's has one element."""
        items = self.num_items_in_batch
        return loss.reshape(items.shape) if isinstance(items, Tensor) else loss

    def compute_in(self, head: Any, hidden: Tensor) -> Tensor:
        """Compute the loss from hidden states (..., H) and return the placeholder (..., 0) for the logits."""
        items, weight = self.num_items_in_batch, head.weight
        op = linear_cross_entropy if is_whole(head) else vocab_parallel_linear_cross_entropy
        loss = op(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            self.target().to(hidden.device),
            linear_bias=head.bias,
            reduction="mean" if items is None else "sum",
            ignore_index=self.ignore_index,
            softcap=self.after_head.softcap,
            logit_scale=self.after_head.scale / self.after_head.divisor,
            denominator=items,
        )
        self.loss = self._shaped(loss)
        self.shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
        autocast = None if hidden.dtype == torch.float64 else autocast_dtype(hidden.device)
        placeholder = hidden.new_empty((*hidden.shape[:-1], 0), dtype=autocast or hidden.dtype)
        if torch.compiler.is_compiling():
            return placeholder
        recompute = self._recompute_in(head, hidden, autocast)
        self.recompute = partial(recompute, hidden, torch.is_grad_enabled())
        self.recompute_detached = partial(recompute, hidden.detach(), False)
        return _Into.apply(self.loss, placeholder, self.upstream) if self.loss.requires_grad else placeholder

    def _recompute_in(self, head: Any, input: Tensor, autocast: torch.dtype | None) -> Callable[..., Tensor]:
        inference = torch.is_inference_mode_enabled()
        weight, bias, shape, upstream = head.weight, head.bias, self.shape, self.upstream
        after_head = self.after_head
        addresses = [t.data_ptr() if type(t) is nn.Parameter else None for t in (weight, bias)]
        of_head, of_input = _versions(weight, bias), _versions(input)
        steps = StepsSince(weight, bias)

        def recompute(hidden: Tensor, grad: bool, dtype: torch.dtype) -> Tensor:
            now = head.weight, head.bias
            # What is sharded or offloaded was gathered for the forward: backward is what an optimizer follows.
            sharded = is_gathered(now[0], weight)
            if sharded and (upstream.has_arrived or steps.any()):
                raise RuntimeError(
                    "liger: outputs.logits are computed when they are first read, and the head's sharded weight may "
                    "have changed since the forward; read them before backward"
                )
            if not sharded and (
                now[0] is not weight
                or now[1] is not bias
                or any(at is not None and t.data_ptr() != at for t, at in zip(now, addresses, strict=True))
                or _versions(*now) != of_head
                or steps.changed(upstream.has_arrived)
                or is_parametrized(head)
            ):
                raise RuntimeError(
                    "liger: outputs.logits are computed when they are first read, and the head's weight or bias has "
                    "changed since the forward; read them before optimizer.step(), or use liger.apply(model, "
                    "loss='full')"
                )
            if _versions(hidden) != of_input:
                raise RuntimeError(
                    "liger: outputs.logits are computed when they are first read, and the head's input was changed in "
                    "place since the forward; read them before that"
                )
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                under_autocast(hidden.device, autocast),
            ):
                # A forward that is running meanwhile asks the head for its own loss, not for that of these states.
                asked = running.requests.pop(head, None)
                try:
                    return after_head(call_again(head, hidden, shape)).to(dtype)
                finally:
                    if asked is not None:
                        running.requests[head] = asked

        return recompute

    def loss_function(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stands where the model's own loss stood, with the parameters of `ForCausalLMLoss`."""
        as_asked = (
            labels is self.labels
            and num_items_in_batch is self.num_items_in_batch
            and shift_labels is self.shift_labels
            and ignore_index == self.ignore_index
            and kwargs.keys() <= self.known
        )
        # The head may have been called for other states before, by a hook inside the model: then these are real logits.
        if self.loss is not None and logits.shape[-1] == 0:
            self.placeholder = logits
            if as_asked and vocab_size == self.shape[-1]:
                return _OutOf.apply(logits, self.loss.detach(), self.upstream) if logits.requires_grad else self.loss
            if self.recompute is None:
                raise RuntimeError(
                    "liger: the model changed the arguments of its loss inside a compiled graph; use "
                    "liger.apply(model, loss='full')"
                )
            logits = self.recompute(logits.dtype)
        if as_asked and type(logits) is Tensor and logits.shape[-1] == vocab_size and self._fits(logits):
            loss = cross_entropy(
                logits.reshape(-1, vocab_size),
                self.target().to(logits.device),
                ignore_index=ignore_index,
                reduction="mean" if num_items_in_batch is None else "sum",
                denominator=num_items_in_batch,
            )
            return self._shaped(loss)
        options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
        return self.known_loss(logits, labels, vocab_size, ignore_index=ignore_index, **options)

    def with_lazy_logits(self, output: Any) -> Any:
        """`output` with lazy logits in the placeholder's place; with none at all in a compiled graph."""
        placeholder, recompute = self.placeholder, self.recompute
        if placeholder is None:
            return output
        if recompute is None and isinstance(output, tuple):
            return tuple(None if value is placeholder else value for value in output)
        if recompute is None:
            kept = {name: value for name, value in output.items() if value is not placeholder}
            return type(output)(**kept)
        dtype, detached = placeholder.dtype, self.recompute_detached if placeholder.requires_grad else None
        compute, without_graph = (f and partial(f, dtype) for f in (recompute, detached))
        lazy = LazyLogits(compute, self.shape, dtype, placeholder.device, without_graph)
        if isinstance(output, tuple):
            return tuple(lazy if value is placeholder else value for value in output)
        for name, value in output.items():
            if value is placeholder:
                output[name] = lazy
        return output


def _versions(*tensors: Tensor | None) -> list[int]:
    return [version(tensor) for tensor in tensors if tensor is not None]


class _Running(threading.local):
    """The requests of the forwards that are running in this thread, by the model and the heads that answer them."""

    def __init__(self) -> None:
        self.requests: dict[nn.Module, LossRequest | None] = {}


running = _Running()


class _Upstream:
    """The loss's gradient on its way from `_OutOf` to `_Into`, and whether one has ever arrived."""

    gradient: Tensor | None = None
    has_arrived = False


class _Into(torch.autograd.Function):
    """The loss goes into the placeholder. Backward: its gradient comes in `upstream`, beside the empty tensor's."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, placeholder: Tensor, upstream: _Upstream) -> Tensor:
        ctx.upstream = upstream
        return placeholder.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.upstream.gradient, ctx.upstream.has_arrived = ctx.upstream.gradient, None, True
        return gradient, None, None


class _OutOf(torch.autograd.Function):
    """The loss comes out of the placeholder. Backward: its gradient is left in `upstream` for `_Into`."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, loss: Tensor, upstream: _Upstream) -> Tensor:
        ctx.upstream = upstream
        ctx.empty = placeholder.detach()
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.upstream.gradient = grad
        return ctx.empty, None, None
