"""A head that others use as well: hooks, wrappers and parametrizations on it, calls of it, models that share it."""

from __future__ import annotations

import copy

import accelerate
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from adapted_models import LLAMA_HEAD
from liger.lazy_logits import LazyLogits
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.parity import assert_same_step, in_fp64

WHOLE = "so they are computed whole"


class OfTheCall(nn.Module):
    """A parametrization that gives another weight at each reading."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * self.calls


def test_a_parametrized_heads_weight_is_computed_once_a_forward(pair, inputs):
    for model in pair:
        parametrize.register_parametrization(model.lm_head, "weight", OfTheCall(), unsafe=True)
        model.lm_head.parametrizations.weight[0].calls = 0
    with pytest.warns(UserWarning, match="a parametrization of lm_head, which may"):
        outputs = [model(**inputs) for model in pair]
    assert type(outputs[1].logits) is torch.Tensor
    assert [model.lm_head.parametrizations.weight[0].calls for model in pair] == [1, 1]
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)


def test_a_hook_on_all_modules_sees_the_logits(pair, inputs):
    seen = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(output) if isinstance(module, nn.Linear) else None
    )
    with hook, pytest.warns(UserWarning, match="a hook on lm_head may see or change logits"):
        pair[1](**inputs)
    assert seen[-1].shape[-1] == TINY["vocab_size"]


@pytest.mark.parametrize("gradients", [torch.no_grad, torch.enable_grad])
def test_a_head_that_a_hook_calls_for_other_states_gives_their_loss_to_nobody(pair, inputs, gradients):
    """A look at what each layer would predict."""
    stock, patched = pair
    exact = in_fp64(stock)
    for model in pair:

        def look(module, args, output, model=model):
            with gradients():
                model.lm_head(output[0] if isinstance(output, tuple) else output)

        model.model.layers[0].register_forward_hook(look)
    assert_same_step(patched, stock, exact, inputs)


def test_a_model_that_shares_the_head_and_runs_inside_gets_logits(pair, inputs):
    stock, patched = pair
    other = copy.deepcopy(stock)
    other.lm_head = patched.lm_head
    apply_adapters(other, [LLAMA_HEAD], loss="linear")
    expected, seen = copy.deepcopy(stock)(inputs["input_ids"]).logits, []
    patched.model.register_forward_pre_hook(lambda *_: seen.append(other(inputs["input_ids"]).logits))
    assert_same_step(patched, stock, in_fp64(stock), inputs)
    torch.testing.assert_close(seen[0], expected)
    assert isinstance(patched(**inputs).logits, LazyLogits)


@pytest.mark.parametrize("wrap", ["output", "input"])
def test_a_forward_put_on_the_heads_instance_after_apply_is_heard(pair, inputs, wrap):
    for model in pair:
        own = model.lm_head.forward
        changed = {"output": lambda x, own=own: 2 * own(x), "input": lambda x, own=own: own(2 * x)}
        model.lm_head.forward = changed[wrap]
    with pytest.warns(UserWarning, match=WHOLE):
        ours, theirs = pair[1](**inputs), pair[0](**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits + 0, theirs.logits)


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 2 * output


@pytest.mark.parametrize("chained", [False, True])
def test_a_users_hook_of_accelerates_is_heard(pair, inputs, chained):
    for model in pair:
        if chained:
            accelerate.hooks.add_hook_to_module(model.lm_head, accelerate.hooks.AlignDevicesHook())
        accelerate.hooks.add_hook_to_module(model.lm_head, Doubling(), append=chained)
    with pytest.warns(UserWarning, match=WHOLE):
        ours = pair[1](**inputs).loss
    torch.testing.assert_close(ours, pair[0](**inputs).loss)


def test_a_hook_of_accelerates_own_changes_nothing(pair, inputs):
    accelerate.hooks.add_hook_to_module(pair[1].lm_head, accelerate.hooks.AlignDevicesHook())
    assert isinstance(pair[1](**inputs).logits, LazyLogits)


def test_logits_of_weights_that_were_lent_for_a_call_are_refused(pair, inputs):
    lent = {name: 2 * parameter.detach() for name, parameter in pair[1].named_parameters()}
    stock, patched = (torch.func.functional_call(model, lent, kwargs=inputs) for model in pair)
    torch.testing.assert_close(patched.loss, stock.loss)
    with pytest.raises(RuntimeError, match="or use liger.apply"):
        patched.logits + 0


@pytest.mark.parametrize("how", ["another", "another's data", "parametrized", "plain weight"])
def test_logits_of_a_head_that_was_changed_since_are_refused(pair, inputs, how):
    head = pair[1].lm_head
    head.bias = nn.Parameter(torch.ones(TINY["vocab_size"], device=inputs["labels"].device))
    outputs = pair[1](**inputs)
    if how == "another":
        head.bias = nn.Parameter(2 * head.bias.detach())
    elif how == "another's data":
        head.bias.data = 2 * head.bias.data
    elif how == "parametrized":
        parametrize.register_parametrization(head, "bias", nn.Identity())
    else:
        weight = 2 * head.weight.detach()
        del head.weight
        head.weight = weight
    with pytest.raises(RuntimeError, match="the head's weight or bias has changed"):
        outputs.logits + 0


def test_fp64_logits_stay_fp64_under_autocast(pair, inputs):
    for model in pair:
        model.double()
    with torch.autocast(inputs["labels"].device.type, torch.bfloat16):
        stock, patched = (model(**inputs).logits for model in pair)
    assert patched.dtype == stock.dtype == torch.float64
    torch.testing.assert_close(patched + 0, stock)


def test_on_the_meta_device(pair, inputs):
    stock, patched = (model.to("meta") for model in pair)
    inputs = {name: value.to("meta") for name, value in inputs.items()}
    for model in (stock, patched):
        outputs = model(**inputs)
        outputs.loss.backward()
        assert (outputs.loss.device.type, outputs.loss.shape) == ("meta", ())
        assert (outputs.logits + 0).shape == (*inputs["labels"].shape, TINY["vocab_size"])


def test_a_compiled_model_that_returns_a_tuple_has_none_in_the_logits_place(pair, inputs):
    outputs = torch.compile(pair[1], backend="eager")(**inputs, return_dict=False)
    torch.testing.assert_close(outputs[0], pair[0](**inputs).loss)
    assert outputs[1] is None


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_head_that_is_compiled_by_itself_has_logits_in_evaluation(pair, inputs, no_interpreter, evaluates):
    stock, patched = (model.train(not evaluates) for model in pair)
    patched.lm_head.compile(backend="aot_eager")
    assert_same_step(patched, stock, in_fp64(stock), inputs)
    assert patched.lm_head._compiled_call_impl is not None
    logits = patched(**inputs).logits
    if evaluates:
        torch.testing.assert_close(logits + 0, stock(**inputs).logits)
    else:
        assert logits is None
