"""The loss of a causal language model, computed inside its head's own forward, without the whole logits.

The model's forward is not restated. It runs as it is, with two of its parts answering otherwise while labels are given:

    lm_head(hidden)          computes the loss from hidden states, weight and targets, where whatever wraps the head has
                             made its weight whole (FSDP, ZeRO-3, DDP's hooks), and returns a placeholder whose last
                             dimension is 0, which passes through a scale, a softcap or a cast at no cost
    self.loss_function(...)  returns that loss; what the model then adds to it (a router's auxiliary loss) it adds

Whatever differs from what this file knows (another loss function or keyword, other labels than the forward was given, a
head that is not the plain Linear, a hook that wants to see logits) takes real logits, and the fused cross entropy or
the model's own loss.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from liger.known_code import HOOKS, HOOKS_ON_ALL, foreign_global
from liger.loss_request import AfterHead, LossRequest, StockLoss, running, stock_loss_of
from liger.sharded_head import before_the_instance, has_transformers_forward, is_taken_away

_GATHERING = (
    *("accelerate.", "deepspeed.", "torch.distributed.", "torch.utils.", "transformers."),
    "trl.models.activation_offloading",
)
"""Whose hooks make a head's weight whole, offload, or name the module that runs, and do not look at its output."""


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
        if reason := self._foreign_loss():
            return reason
        try:
            after = self.after_head(model)
        except AttributeError as error:
            return f"its logits' scale and softcap cannot be read: {error}"
        if reason := self._softcap_declines(model):
            return reason
        for name, value in ((self.logit_scale, after.scale), (self.logit_divisor, after.divisor)):
            if not isinstance(value, (int, float)):
                return f"its {name} is {type(value).__name__}, not a number"
        if after.softcap is not None and not 0 < after.softcap < math.inf:
            return f"its {self.softcap} is {after.softcap}, not a positive number"
        return None

    def _foreign_loss(self) -> str | None:
        """Why transformers' loss is another than it was written, or None: each of these calls the next."""
        from transformers.loss import loss_utils

        chain = ((loss_utils, self.loss), (loss_utils, "fixed_cross_entropy"), (F, "cross_entropy"))
        return next(filter(None, (foreign_global(*function) for function in chain)), None)

    def _softcap_declines(self, model: nn.Module) -> str | None:
        """Why the model may not apply the softcap that `softcap` says, or may apply one that it does not, or None."""
        caps = _mentions(type(model), *filter(None, ("softcap", "soft_cap", (self.softcap or "").rpartition(".")[2])))
        if caps == (self.softcap is not None):
            return None
        return f"its forward mentions {'a' if caps else 'no'} softcap, and the adapter's is {self.softcap}"

    def find_head(self, model: nn.Module) -> Any:
        """What the model calls for its logits, or None where it has nothing under that name."""
        try:
            return attrgetter(self.head)(model)
        except AttributeError:
            return None

    def heads(self, model: nn.Module) -> dict[str, Any]:
        """The head by its name in `model`; under PEFT's modules_to_save the copies, one of which runs as it is."""
        head = self.find_head(model)
        if (type(head).__module__, type(head).__name__) != ("peft.utils.other", "ModulesToSaveWrapper"):
            return {self.head: head}
        copies = {f"{self.head}.modules_to_save.{adapter}": copy for adapter, copy in head.modules_to_save.items()}
        return {f"{self.head}.original_module": head.original_module, **copies}

    def after_head(self, model: Any) -> AfterHead:
        """What the model does to its head's output, by its present configuration."""
        return AfterHead(
            scale=attrgetter(self.logit_scale)(model) if self.logit_scale else 1.0,
            divisor=attrgetter(self.logit_divisor)(model) if self.logit_divisor else 1.0,
            softcap=attrgetter(self.softcap)(model.config) if self.softcap else None,
        )

    def head_declines(self, head: Any) -> str | None:
        """Why one of the `heads` must return its logits, or None. `can_fuse` asks more at each call."""
        # fully_shard derives a class of its own from the module's: look behind it.
        cls = next(c for c in type(head).__mro__ if not c.__module__.startswith("torch.distributed."))
        if cls is not nn.Linear:
            return f"{self.head} is {cls.__module__}.{cls.__qualname__}, not torch.nn.Linear"
        if "forward" in vars(head) and not has_transformers_forward(head):
            return f"{self.head}.forward was replaced on the instance"
        return None

    def wants_logits(self, head: Any) -> str | None:
        """What may see the head's logits, or would not be the same when it is called again for lazy ones, or None."""
        if not isinstance(head, nn.Module):
            return None
        if is_parametrized(head):
            return f"a parametrization of {self.head}, which may be random, changes logits"
        if "forward" in vars(head) and not (has_transformers_forward(head) or _is_accelerates(head)):
            return f"{self.head}.forward was replaced on the instance, which may change logits"
        hooks = (*(getattr(head, kind) for kind in HOOKS), *HOOKS_ON_ALL)
        watched = any(not _module_of(hook).startswith(_GATHERING) for kind in hooks for hook in kind.values())
        return f"a hook on {self.head} may see or change logits" if watched else None

    def model_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` and `loss_function` for a subclass of the model's class `base`."""
        stock = base.forward
        parameters = list(inspect.signature(stock).parameters)
        position = parameters.index("labels") - 1
        known = {*parameters, *_kwargs_of_every_forward()}
        stock_loss = base.loss_function  # type: ignore[attr-defined]
        known_loss, spec = stock_loss_of(self.loss), self

        def requested(self: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LossRequest | None:
            labels = args[position] if len(args) > position else kwargs.get("labels")
            if labels is None or stock_loss.fget(self) is not known_loss:
                return None
            if not torch.compiler.is_compiling() and (reason := spec._foreign_loss()):
                _warn(f"{reason}, so the model's own loss runs")
                return None
            # A compiled graph cannot hold lazy logits, and an evaluation loop reads them: it gets the real ones.
            if torch.compiler.is_compiling() and not self.training:
                return None
            if not kwargs.keys() <= known:
                unknown = ", ".join(sorted(kwargs.keys() - known))
                _warn(f"the fused loss does not know {unknown}, so the model's own runs")
                return None
            return LossRequest(labels, spec.loss, spec.after_head(self), kwargs, known)

        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            request, requests = requested(self, args, kwargs), running.requests
            heads = list(spec.heads(self).values())
            if request is None and self not in requests and not _is_asked_by_a_stranger(self, heads):
                return stock(self, *args, **kwargs)
            found = (spec.find_head(self), *heads) if request is not None else ()
            if reason := next(filter(None, map(spec.wants_logits, found)), None):
                _warn(f"{reason}, so they are computed whole")
                heads = []
            # An evaluation loop reads the logits after the forward.
            if not self.training and any(_leaves_none(self, head) for head in heads if isinstance(head, nn.Linear)):
                heads = []
            outer = dict(requests)
            requests.update(dict.fromkeys((self, *heads), request))
            try:
                output = stock(self, *args, **kwargs)
            finally:
                requests.clear()
                requests.update(outer)
            return output if request is None else request.with_lazy_logits(output)

        def loss_function(self: nn.Module) -> Callable[..., Tensor]:
            request = running.requests.get(self)
            return stock_loss.fget(self) if request is None else request.loss_function

        return {"forward": forward, "loss_function": property(loss_function, stock_loss.fset)}

    def head_members(self, base: type[nn.Module]) -> dict[str, Any]:
        """`forward` for a subclass of the head's class `base`."""
        return {"forward": _answering(base.forward)}

    def parallel_head_members(self) -> dict[str, Any]:
        """The same for a head on whose instance transformers' tensor parallelism has put a forward of its own."""
        return {"forward": before_the_instance(_answering(lambda head, input: vars(head)["forward"](input)))}


def _mentions(cls: type[nn.Module], *parts: str) -> bool:
    """Whether a name in the code of the class's own forward, or a word that it holds, contains one of the parts."""
    code = inspect.unwrap(cls.forward).__code__
    words = (*code.co_names, *(word for word in code.co_consts if isinstance(word, str) and " " not in word))
    return any(part in word for word in words for part in parts)


def _answering(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A head's forward that computes the loss where it is asked for and can be, and runs `stock` elsewhere."""

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        request = running.requests.get(self)
        if request is None or not request.can_fuse(self, input):
            return stock(self, input)
        return request.compute_in(self, input)

    return forward


def _kwargs_of_every_forward() -> set[str]:
    """What any model passes on from its forward's keywords to its loss: the loss's own, and what is not for a loss."""
    from transformers.utils import TransformersKwargs

    renamed = "past_key_values"  # from transformers 5.24 on a decorator takes it, and hands it on as `cache`
    filled_in = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")  # from the config
    own = ("ignore_index", "shift_labels", "return_dict", "use_cache", renamed)
    return {*TransformersKwargs.__annotations__, *own, *filled_in}


def _leaves_none(model: nn.Module, head: nn.Linear) -> bool:
    """Whether lazy logits could not be had from the head after the forward; `head.compile()` makes a graph of it."""
    return is_taken_away(model, head) or getattr(head, "_compiled_call_impl", None) is not None


def _is_asked_by_a_stranger(model: nn.Module, heads: list[Any]) -> bool:
    """Whether a head was asked for a loss by a model that runs now, shares the head and does not hold `model`."""
    asked = next(filter(None, map(running.requests.get, heads)), None)
    if asked is None:
        return False
    asking = next(module for module, request in running.requests.items() if request is asked)
    return all(module is not model for module in asking.modules())


def _is_accelerates(head: nn.Module) -> bool:
    """Whether the forward on the instance is accelerate's, which runs nothing but accelerate's own hooks."""
    hook = getattr(head, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return all(_module_of(of).startswith("accelerate.") for of in (vars(head)["forward"], *map(type, hooks)))


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))


def _warn(message: str) -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(f"liger: {message}", stacklevel=3)
