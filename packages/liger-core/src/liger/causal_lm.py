"""The loss of a causal language model, computed inside its head's own forward, without the whole logits.

The model's forward is not restated. It runs as it is, with two of its parts answering otherwise while labels are given:

    lm_head(hidden)          computes the loss from hidden states, weight and targets, where whatever wraps the head has
                             made its weight whole (FSDP, ZeRO-3, DDP's hooks), and returns a placeholder whose last
                             dimension is 0, which passes through a scale, a softcap or a cast at no cost
    self.loss_function(...)  returns that loss; what the model then adds to it (a router's auxiliary loss) it adds

Whatever differs from what this file knows (another loss function, other labels than the forward was given, a head that
is not the plain Linear) takes real logits, and the fused cross entropy or the model's own loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from liger.loss_request import AfterHead, LossRequest, StockLoss, stock_loss_of
from liger.sharded_head import before_the_instance, has_transformers_forward, is_taken_away

_REQUEST = "_liger_loss_request"


@dataclass(frozen=True)
class CausalLM:
    """A language-model class and its head.

    Attributes:
        model: the class's name.
        head: its attribute that holds the head, dotted where it lies deeper.
        softcap: the config's attribute, perhaps dotted, that holds the logits' softcap, if the model applies one; None
            there means that it applies none.
        logit_scale: the model's attribute, perhaps dotted (`config.logit_scale`), that its logits are multiplied by.
        logit_divisor: the one that they are divided by. Scaled logits are then capped.
        loss: which of transformers' losses the model takes: ForCausalLMLoss compares each position with the label of
            the next, ForMaskedLMLoss with its own.
    """

    model: str
    head: str = "lm_head"
    softcap: str | None = None
    logit_scale: str | None = None
    logit_divisor: str | None = None
    loss: StockLoss = "ForCausalLMLoss"

    def declines(self, model: nn.Module) -> str | None:
        """Why the loss of `model` must stay its own, or None."""
        loss_function = getattr(model, "loss_function", None)
        if loss_function is not stock_loss_of(self.loss):
            return f"its loss function is {getattr(loss_function, '__qualname__', loss_function)}, not {self.loss}"
        try:
            after = self.after_head(model)
        except AttributeError as error:
            return f"its logits' scale and softcap cannot be read: {error}"
        for name, value in ((self.logit_scale, after.scale), (self.logit_divisor, after.divisor)):
            if not isinstance(value, (int, float)):
                return f"its {name} is {type(value).__name__}, not a number"
        return None

    def find_head(self, model: nn.Module) -> Any:
        """The head, or None where the model has none under that name."""
        try:
            return attrgetter(self.head)(model)
        except AttributeError:
            return None

    def after_head(self, model: Any) -> AfterHead:
        """What the model does to its head's output, by its present configuration."""
        return AfterHead(
            scale=attrgetter(self.logit_scale)(model) if self.logit_scale else 1.0,
            divisor=attrgetter(self.logit_divisor)(model) if self.logit_divisor else 1.0,
            softcap=attrgetter(self.softcap)(model.config) if self.softcap else None,
        )

    def head_declines(self, model: Any) -> str | None:
        """Why the head must return its logits, or None. Asked when applied; `can_fuse` asks again at each call."""
        head = self.find_head(model)
        if head is None:
            return f"there is no {self.head}"
        # fully_shard derives a class of its own from the module's: look behind it.
        known = [cls for cls in type(head).__mro__ if not cls.__module__.startswith("torch.distributed.")]
        if known[0] is not nn.Linear:
            return f"{self.head} is {type(head).__name__}, not Linear"
        if "forward" in vars(head) and not has_transformers_forward(head):
            return f"{self.head}.forward was replaced on the instance"
        return None

    def model_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` and `loss_function` for a subclass of the model's class `base`."""
        stock = base.forward
        position = list(inspect.signature(stock).parameters).index("labels") - 1
        stock_loss = base.loss_function  # type: ignore[attr-defined]
        known_loss, spec = stock_loss_of(self.loss), self

        @functools.wraps(stock)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            labels = args[position] if len(args) > position else kwargs.get("labels")
            if labels is None or stock_loss.fget(self) is not known_loss:
                return stock(self, *args, **kwargs)
            # A compiled graph cannot hold lazy logits, and an evaluation loop reads them: it gets the real ones.
            if torch.compiler.is_compiling() and not self.training:
                return stock(self, *args, **kwargs)
            request = LossRequest(labels, spec.loss, spec.after_head(self), kwargs)
            head = spec.find_head(self)
            # An evaluation loop reads the logits after the forward.
            if not self.training and isinstance(head, nn.Linear) and is_taken_away(self, head):
                head = None
            asked = [part for part in (self, head) if part is not None]
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
        return {"forward": _answering(base.forward)}

    def parallel_head_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """The same for a head on whose instance transformers' tensor parallelism has put a forward of its own."""
        return {"forward": before_the_instance(_answering(lambda head, input: vars(head)["forward"](input)))}


def _answering(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A head's forward that computes the loss where it is asked for and can be, and runs `stock` elsewhere."""

    @functools.wraps(stock)
    def forward(self: nn.Module, input: Tensor) -> Tensor:
        request: LossRequest | None = getattr(self, _REQUEST, None)
        if request is None or not request.can_fuse(self, input):
            return stock(self, input)
        return request.compute_in(self, input)

    return forward
