"""The loss inside the head: which loss it is, and that nothing asked of it is dropped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, modeling_utils
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from liger.adapter import Adapter
from liger.causal_lm import CausalLM
from liger.lazy_logits import LazyLogits
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.tiny import batch, build

ADAPTER = Adapter(modeling="transformers.models.llama.modeling_llama", head=CausalLM("LlamaForCausalLM"))


@pytest.fixture
def pair(device):
    """(stock, patched) of the same weights; only the loss is patched."""
    stock = build(LlamaForCausalLM, LlamaConfig(**TINY), device)
    patched = copy.deepcopy(stock)
    apply_adapters(patched, [ADAPTER], loss="linear")
    return stock, patched


@pytest.fixture
def inputs(device):
    return batch(TINY["vocab_size"], device)


def assert_same_loss_and_gradients(pair, **inputs):
    losses = []
    for model in pair:
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6, check_dtype=False)  # stock promotes to a divisor's fp64
    for (name, theirs), ours in zip(pair[0].named_parameters(), pair[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss", ["linear", "full"])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"ignore_index": 5},
        {"num_items_in_batch": 3},
        {"num_items_in_batch": torch.tensor(3)},
        {"num_items_in_batch": torch.tensor([3.0])},
        {"num_items_in_batch": torch.tensor(3, dtype=torch.float64)},
        {"logits_to_keep": 0},
        {"unknown_to_the_loss": 1},
    ],
    ids=str,
)
def test_options_of_the_loss(device, inputs, loss, extra):
    stock = build(LlamaForCausalLM, LlamaConfig(**TINY), device)
    patched = copy.deepcopy(stock)
    apply_adapters(patched, [ADAPTER], loss=loss)
    if "ignore_index" in extra:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, extra["ignore_index"])
    assert_same_loss_and_gradients((stock, patched), **inputs, **extra)


def test_labels_given_by_position(pair, inputs):
    stock, patched = (model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss for model in pair)
    torch.testing.assert_close(patched, stock)


def test_shift_labels_that_keep_some_positions(pair, inputs):
    """A 2-D mask of positions, and labels for these alone: as packed training asks for."""
    if not hasattr(modeling_utils, "slice_logits_to_keep"):
        pytest.skip("this transformers takes no mask of positions")
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep[:, ::2] = True
    shifted = inputs["labels"].roll(-1, -1)[keep]
    assert_same_loss_and_gradients(pair, **inputs, logits_to_keep=keep, shift_labels=shifted)


def test_labels_that_do_not_fit_raise_as_the_models_own_loss_does(pair, inputs):
    for model in pair:
        with pytest.raises(ValueError, match="batch_size"):
            model(**inputs, logits_to_keep=3)


def test_all_labels_ignored(pair, inputs):
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    stock, patched = (model(**inputs).loss for model in pair)
    assert torch.isnan(stock)
    assert torch.isnan(patched)
    loss = pair[1](**inputs, num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in pair[1].parameters())


def test_evaluation_holds_no_logits_until_they_are_read(pair, inputs):
    patched = pair[1].eval()
    with torch.no_grad():
        outputs = patched(**inputs)
        stock = pair[0].eval()(**inputs)
    assert isinstance(outputs.logits, LazyLogits)
    assert outputs.loss.grad_fn is None
    torch.testing.assert_close(outputs.loss, stock.loss)
    read = outputs.logits + 0
    assert not read.requires_grad
    torch.testing.assert_close(read, stock.logits)


def test_logits_first_read_without_gradients_still_have_them(pair, inputs):
    outputs = pair[1](**inputs)
    with torch.no_grad():
        outputs.logits.argmax(-1)
    assert (outputs.logits + 0).requires_grad


def test_logits_read_after_the_weights_changed_are_refused(pair, inputs):
    outputs = pair[1](**inputs)
    with torch.no_grad():
        pair[1].lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        outputs.logits + 0


def test_loss_may_be_changed_in_place(pair, inputs):
    """Trainer multiplies it in place."""
    loss = pair[1](**inputs).loss
    loss *= 2
    loss.backward()


def test_backward_twice(pair, inputs):
    for model in pair:
        loss = model(**inputs).loss
        loss.backward(retain_graph=True)
        loss.backward()
    for ours, theirs in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_autocast(pair, inputs, device):
    with torch.autocast(device.type, torch.bfloat16):
        stock, patched = (model(**inputs) for model in pair)
        assert patched.logits.dtype == stock.logits.dtype == torch.bfloat16
        torch.testing.assert_close(patched.loss, stock.loss, rtol=1e-2, atol=1e-2)
    patched.loss.backward()
    assert pair[1].lm_head.weight.grad.dtype == torch.float32


def test_a_frozen_head_gets_no_gradient(pair, inputs):
    for model in pair:
        model.lm_head.weight.requires_grad_(False)
        model(**inputs).loss.backward()
    assert pair[1].lm_head.weight.grad is None
    for ours, theirs in zip(pair[1].model.parameters(), pair[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_a_head_wrapped_after_apply_is_heard(pair, inputs):
    """An adapter put around the head later (LoRA, say) must train: the loss takes the wrapper's logits."""

    class Wrapper(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.delta = nn.Parameter(torch.full((TINY["vocab_size"],), 0.5))

        def forward(self, x):
            return self.base(x) + self.delta * x.sum(-1, keepdim=True)

    for model in pair:
        model.lm_head = Wrapper(model.lm_head).to(inputs["labels"].device)
    assert_same_loss_and_gradients(pair, **inputs)


def test_a_second_call_of_the_head_gets_logits(pair, inputs):
    """The loss is taken from the first call; whoever calls the head again meets logits."""
    patched = pair[1]
    seen: list[int] = []
    patched.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[-1]))
    outputs = patched(**inputs)
    outputs.logits + 0
    assert seen == [0, TINY["vocab_size"]]


def test_an_exception_in_the_forward_leaves_nothing_behind(pair, inputs):
    patched = pair[1]
    before = [sorted(vars(m)) for m in patched.modules()]
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        patched(labels=inputs["labels"])
    assert [sorted(vars(m)) for m in patched.modules()] == before


def test_backward_enters_the_head_through_its_output(pair, inputs):
    """FSDP gathers a head of its own when the gradient of the head's output is computed, before the loss's backward."""
    patched, order = pair[1], []

    def watch(module, args, output):
        output.register_hook(lambda grad: order.append("output"))

    patched.lm_head.register_forward_hook(watch)
    patched.lm_head.weight.register_hook(lambda g: order.append("weight"))
    patched(**inputs).loss.backward()
    assert order == ["output", "weight"]
