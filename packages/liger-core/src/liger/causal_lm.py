"""The loss of a causal language model, computed inside its head's own forward, without the whole logits.

The model's forward is not restated. It runs as it is, with two of its parts answering otherwise while labels are given:

    lm_head(hidden)          computes the loss from hidden states, weight and targets, where whatever wraps the head has
                             made its weight whole (FSDP, ZeRO-3, DDP's hooks), and returns a placeholder whose last
                             dimension is 0, which passes through a softcap or a cast at no cost
    self.loss_function(...)  returns that loss; what the model then adds to it (a router's auxiliary loss) it adds

The loss reaches the placeholder and comes back out of it through autograd, so that backward enters the head through the
head's output: FSDP gathers a head of its own there.

Whatever differs from what this file knows (another loss function, other labels than the forward was given, a head that
is not the plain Linear) takes real logits, and the fused cross entropy or the model's own loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liger.lazy_logits import LazyLogits
from liger.ops import cross_entropy, linear_cross_entropy

_REQUEST = "_liger_loss_request"

StockLoss = Literal["ForCausalLMLoss", "ForMaskedLMLoss"]


@dataclass(frozen=True)
class CausalLM:
    """A language-model class and its head.

    Attributes:
        model: the class's name.
        head: its attribute that holds the head, dotted where it lies deeper.
        softcap: the config's attribute, perhaps dotted, that holds the logits' softcap, if the model applies one; None
            there means that it applies none.
        loss: which of transformers' losses the model takes: ForCausalLMLoss compares each position with the label of
            the next, ForMaskedLMLoss with its own.
    """

    model: str
    head: str = "lm_head"
    softcap: str | None = None
    loss: StockLoss = "ForCausalLMLoss"

    def declines(self, model: nn.Module) -> str | None:
        """Why the loss of `model` must stay its own, or None."""
        loss_function = getattr(model, "loss_function", None)
        if loss_function is not _stock_loss(self.loss):
            return f"its loss function is {getattr(loss_function, '__qualname__', loss_function)}, not {self.loss}"
        try:
            self.cap(model)
        except AttributeError:
            return f"its config has no {self.softcap}"
        return None

    def find_head(self, model: nn.Module) -> Any:
        """The head, or None where the model has none under that name."""
        try:
            return attrgetter(self.head)(model)
        except AttributeError:
            return None

    def cap(self, model: Any) -> float | None:
        """The softcap of the model's logits."""
        return attrgetter(self.softcap)(model.config) if self.softcap else None

    def head_declines(self, model: Any) -> str | None:
        """Why the head must return its logits, or None. Asked when applied; `can_fuse` asks again at each call."""
        head = self.find_head(model)
        if head is None:
            return f"there is no {self.head}"
        # fully_shard derives a class of its own from the module's: look behind it.
        known = [cls for cls in type(head).__mro__ if not cls.__module__.startswith("torch.distributed.")]
        if known[0] is not nn.Linear:
            return f"{self.head} is {type(head).__name__}, not Linear"
        if "forward" in vars(head):
            return f"{self.head}.forward was replaced on the instance"
        return None

    def model_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` and `loss_function` for a subclass of the model's class `base`."""
        stock = base.forward
        position = list(inspect.signature(stock).parameters).index("labels") - 1
        stock_loss = base.loss_function  # type: ignore[attr-defined]
        known_loss, spec = _stock_loss(self.loss), self

        @functools.wraps(stock)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            labels = args[position] if len(args) > position else kwargs.get("labels")
            if labels is None or stock_loss.fget(self) is not known_loss:
                return stock(self, *args, **kwargs)
            # A compiled graph cannot hold lazy logits, and an evaluation loop reads them: it gets the real ones.
            if torch.compiler.is_compiling() and not self.training:
                return stock(self, *args, **kwargs)
            request = _LossRequest(labels, spec, spec.cap(self), kwargs)
            asked = [part for part in (self, spec.find_head(self)) if part is not None]
            for part in asked:
                setattr(part, _REQUEST, request)
            try:
                output = stock(self, *args, **kwargs)
            finally:
                for part in asked:
                    delattr(part, _REQUEST)
            return request.with_lazy_logits(output)

        def loss_function(self: nn.Module) -> Callable[..., Tensor]:
            request = getattr(self, _REQUEST, None)
            return stock_loss.fget(self) if request is None else request.loss_function

        return {"forward": forward, "loss_function": property(loss_function, stock_loss.fset)}

    def head_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` for a subclass of the head's class `base`."""
        stock = base.forward

        @functools.wraps(stock)
        def forward(self: nn.Module, input: Tensor) -> Tensor:
            request: _LossRequest | None = getattr(self, _REQUEST, None)
            if request is None or not request.can_fuse(self, input):
                return stock(self, input)
            return request.compute_in(self, input)

        return {"forward": forward}


def _stock_loss(name: StockLoss) -> Callable[..., Tensor]:
    """One of the loss functions that this file knows; imported late, because liger itself needs no transformers."""
    from transformers.loss import loss_utils

    return getattr(loss_utils, name)


class _LossRequest:
    """What one forward of a model was asked for, and what its head made of it."""

    def __init__(self, labels: Tensor, spec: CausalLM, softcap: float | None, kwargs: dict[str, Any]) -> None:
        self.labels = labels
        self.known_loss = _stock_loss(spec.loss)
        self.softcap = softcap
        self.shifts = spec.loss == "ForCausalLMLoss"
        self.shift_labels: Tensor | None = kwargs.get("shift_labels")
        self.num_items_in_batch: Tensor | int | None = kwargs.get("num_items_in_batch")
        self.ignore_index: int = kwargs.get("ignore_index", -100)
        self.loss: Tensor | None = None
        self.placeholder: Tensor | None = None
        self.recompute: Callable[[torch.dtype], Tensor] | None = None
        self.upstream: list[Tensor] = []
        self.shape = torch.Size()

    def target(self) -> Tensor:
        """For each position its label or that of the next, flattened, as the model's own loss takes them."""
        if not self.shifts:
            return self.labels.reshape(-1)
        if self.shift_labels is not None:
            return self.shift_labels.reshape(-1)
        return F.pad(self.labels, (0, 1), value=self.ignore_index)[..., 1:].reshape(-1)

    def can_fuse(self, head: Any, hidden: Tensor) -> bool:
        """Whether the head's weight is one that the op may read, and there is a target for every hidden state."""
        plain = type(head.weight) in (Tensor, nn.Parameter) and type(hidden) in (Tensor, nn.Parameter)
        return plain and self.loss is None and self._fits(hidden)

    def _fits(self, rows: Tensor) -> bool:
        """Whether there is one label for every row, and one number to divide by."""
        labels, items = self.labels, self.num_items_in_batch
        if self.shifts and self.shift_labels is not None:
            labels = self.shift_labels
        scalar = items.dim() == 0 if isinstance(items, Tensor) else True
        return scalar and rows.shape[:-1].numel() == labels.numel()

    def compute_in(self, head: Any, hidden: Tensor) -> Tensor:
        """Compute the loss from hidden states (..., H) and return the placeholder (..., 0) for the logits."""
        items = self.num_items_in_batch
        self.loss = linear_cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            self.target().to(hidden.device),
            linear_bias=head.bias,
            reduction="mean" if items is None else "sum",
            ignore_index=self.ignore_index,
            softcap=self.softcap,
            denominator=items,
        )
        self.shape = torch.Size((*hidden.shape[:-1], head.weight.shape[0]))
        kind = hidden.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        placeholder = hidden.new_empty((*hidden.shape[:-1], 0), dtype=autocast or hidden.dtype)
        if torch.compiler.is_compiling():
            return placeholder
        self.recompute = self._recompute_in(head, hidden, autocast)
        return _Into.apply(self.loss, placeholder, self.upstream) if self.loss.requires_grad else placeholder

    def _recompute_in(self, head: Any, hidden: Tensor, autocast: torch.dtype | None) -> Callable[[torch.dtype], Tensor]:
        grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        version = None if head.weight.is_inference() else head.weight._version  # inference tensors do not count theirs
        softcap = self.softcap

        def recompute(dtype: torch.dtype) -> Tensor:
            if version is not None and head.weight._version != version:
                raise RuntimeError(
                    "outputs.logits are computed when they are first read, and the head's weight has changed since the "
                    "forward; read them before optimizer.step()"
                )
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                torch.autocast(hidden.device.type, autocast, enabled=autocast is not None),
            ):
                logits = head(hidden)
                if softcap is not None:
                    logits = torch.tanh(logits / softcap) * softcap
                return logits.to(dtype)

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
        )
        if self.loss is not None:
            if as_asked and vocab_size == self.shape[-1]:
                self.placeholder = logits
                return _OutOf.apply(logits, self.loss.detach(), self.upstream) if logits.requires_grad else self.loss
            assert self.recompute is not None, "the model changed the loss's arguments inside a compiled graph"
            logits = self.recompute(logits.dtype)
        if as_asked and type(logits) is Tensor and logits.shape[-1] == vocab_size and self._fits(logits):
            return cross_entropy(
                logits.reshape(-1, vocab_size),
                self.target().to(logits.device),
                ignore_index=ignore_index,
                reduction="mean" if num_items_in_batch is None else "sum",
                denominator=num_items_in_batch,
            )
        options = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
        return self.known_loss(logits, labels, vocab_size, ignore_index=ignore_index, **options)

    def with_lazy_logits(self, output: Any) -> Any:
        """`output` with lazy logits in the placeholder's place; with none at all in a compiled graph."""
        placeholder, recompute = self.placeholder, self.recompute
        if placeholder is None:
            return output
        if recompute is None:
            kept = {name: value for name, value in output.items() if value is not placeholder}
            return type(output)(**kept)
        dtype = placeholder.dtype
        lazy = LazyLogits(lambda: recompute(dtype), self.shape, dtype, placeholder.device)
        if isinstance(output, tuple):
            return tuple(lazy if value is placeholder else value for value in output)
        for name, value in output.items():
            if value is placeholder:
                output[name] = lazy
        return output


class _Into(torch.autograd.Function):
    """The loss goes into the placeholder. Backward: its gradient comes in `upstream`, beside the empty tensor's."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, placeholder: Tensor, upstream: list[Tensor]) -> Tensor:
        ctx.upstream = upstream
        return placeholder.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None, None]:
        return ctx.upstream.pop(), None, None


class _OutOf(torch.autograd.Function):
    """The loss comes out of the placeholder. Backward: its gradient is left in `upstream` for `_Into`."""

    @staticmethod
    def forward(ctx: Any, placeholder: Tensor, loss: Tensor, upstream: list[Tensor]) -> Tensor:
        ctx.upstream = upstream
        ctx.empty = placeholder.detach()
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.upstream.append(grad)
        return ctx.empty, None, None
