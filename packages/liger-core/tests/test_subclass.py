"""The classes that are swapped in: made once, and made again where what they were made of is another."""

from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.utils.deprecation import deprecate_kwarg

from adapted_models import LLAMA, llama
from liger.adapter import Layer
from liger.ops import rotary
from liger.patch import apply_adapters
from liger.subclass import function_class, layer_class
from liger.testing.tiny import batch

pytestmark = pytest.mark.usefixtures("no_interpreter")


def apply(model):
    return apply_adapters(model, [LLAMA])


def test_a_function_that_was_replaced_since_another_model_was_patched_runs(device, monkeypatch):
    apply(llama(device))
    attention, calls = modeling_llama.eager_attention_forward, []

    def counted(*args, **kwargs):
        calls.append(None)
        return attention(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    model = llama(device)
    apply(model)
    model(**batch(99, device))
    assert len(calls) == len(model.model.layers)


def test_a_global_that_comes_and_goes_later_is_there_and_gone(device, monkeypatch):
    """As that of a module which imports on demand."""

    def forward(self, hidden_states, *args, **kwargs):
        return later(hidden_states), None  # noqa: F821

    code = types.FunctionType(forward.__code__, vars(modeling_llama))
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", code)
    model = llama(device)
    ops = (("apply_rotary_pos_emb", rotary),)
    model.model.layers[0].self_attn.__class__ = function_class(modeling_llama.LlamaAttention, ops)
    x = torch.ones(1, device=device)
    monkeypatch.setattr(modeling_llama, "later", torch.neg, raising=False)
    assert model.model.layers[0].self_attn(x)[0] == -1
    monkeypatch.delattr(modeling_llama, "later")
    with pytest.raises(NameError, match="later"):
        model.model.layers[0].self_attn(x)


def test_an_op_stands_for_a_function_behind_decorators_too(device, monkeypatch):
    attention, calls = modeling_llama.LlamaAttention, []

    @functools.wraps(rotary)
    def counted(*args, **kwargs):
        calls.append(None)
        return rotary(*args, **kwargs)

    renamed = deprecate_kwarg("positions", "99.0", new_name="position_ids")
    monkeypatch.setattr(attention, "forward", renamed(renamed(attention.forward)))
    model = llama(device)
    expected = model(**batch(99, device)).loss
    patch = apply_adapters(model, [dataclasses.replace(LLAMA, functions={"apply_rotary_pos_emb": counted})])
    torch.testing.assert_close(model(**batch(99, device)).loss, expected)
    assert len(calls) == len(model.model.layers)
    patch.undo()
    model(**batch(99, device))
    assert len(calls) == len(model.model.layers)


def test_a_decorator_that_hides_the_forward_keeps_it(device, monkeypatch):
    hidden = [modeling_llama.LlamaAttention.forward]
    source = "def forward(self, *args, **kwargs):\n    return hidden[0](self, *args, **kwargs)"
    names = {"__name__": modeling_llama.__name__, "hidden": hidden}
    exec(source, names)
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", functools.wraps(hidden[0])(names["forward"]))
    model = llama(device)
    reasons = {d.reason for d in apply(model).declined if d.kind == "rope"}
    assert reasons == {"LlamaAttention.forward is wrapped by a decorator that does not show what it wraps"}


def test_models_of_one_type_share_their_classes(device):
    first, second = llama(device), llama(device)
    apply(first)
    apply(second)
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]


class Difference(nn.Module):
    def forward(self, minuend, subtrahend):
        return minuend - subtrahend


class FusedDifference(Layer):
    kind = "norm"

    def declines(self, module):
        return None

    def forward(self, module, x, y):
        return x - y


def test_arguments_by_keyword_arrive_by_their_names_and_not_in_their_order():
    stock = Difference()
    swapped = layer_class(Difference, FusedDifference())()
    one, two = torch.ones(1), torch.full((1,), 2.0)
    for given in ({"minuend": one, "subtrahend": two}, {"subtrahend": two, "minuend": one}):
        assert swapped(**given) == stock(**given)
    assert swapped(one, subtrahend=two) == stock(one, two)
    with pytest.raises(TypeError, match="difference"):
        swapped(one, difference=two)
