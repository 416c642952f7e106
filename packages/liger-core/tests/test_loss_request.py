"""What a forward with labels returns: gradients through the head, what they cost, and logits for who reads them."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from liger.lazy_logits import LazyLogits
from liger.testing import TINY, assert_as_exact_as
from liger.testing.parity import MODEL_DEPTH, assert_each_as_exact_as, in_fp64
from liger.testing.tiny import batch


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_evaluation_holds_no_logits_until_they_are_read(pair, inputs, without_gradients):
    patched = pair[1].eval()
    with without_gradients():
        outputs = patched(**inputs)
        stock = pair[0].eval()(**inputs)
    assert isinstance(outputs.logits, LazyLogits)
    assert outputs.loss.grad_fn is None
    torch.testing.assert_close(outputs.loss, stock.loss)
    read = outputs.logits + 0
    assert not read.requires_grad
    assert outputs.logits.is_inference() == stock.logits.is_inference()
    torch.testing.assert_close(read, stock.logits)


def test_logits_first_read_without_gradients_still_have_them(pair, inputs):
    outputs = pair[1](**inputs)
    with torch.no_grad():
        outputs.logits.argmax(-1)
    assert (outputs.logits + 0).requires_grad


def test_logits_that_were_detached_do_not_keep_the_graph(pair, inputs):
    stock, patched = pair
    hidden = []
    patched.model.norm.register_forward_hook(lambda module, args, output: hidden.append(weakref.ref(output)))
    kept = patched(**inputs).logits.float().detach()
    gc.collect()
    assert hidden[0]() is None
    torch.testing.assert_close(kept + 0, stock(**inputs).logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_logits_may_be_what_a_checkpoint_is_given(pair, inputs, use_reentrant):
    def loss(logits):
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    gradients = []
    for model, read in zip(pair, (0, 0 if use_reentrant else None), strict=True):
        logits = model(**inputs).logits
        logits = logits if read is None else logits + read
        checkpoint(loss, logits, use_reentrant=use_reentrant).backward()
        gradients.append(model.lm_head.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("changed", ["weight", "bias"])
def test_logits_read_after_the_head_changed_are_refused(pair, inputs, changed):
    patched = pair[1]
    patched.lm_head.bias = nn.Parameter(torch.ones(TINY["vocab_size"], device=inputs["labels"].device))
    outputs = patched(**inputs)
    with torch.no_grad():
        getattr(patched.lm_head, changed).mul_(2)
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        outputs.logits + 0


@pytest.mark.parametrize(
    "replace",
    [
        lambda head: setattr(head, "weight", nn.Parameter(2 * head.weight.detach())),
        lambda head: setattr(head.weight, "data", 2 * head.weight.data),
        lambda head: head.load_state_dict({"weight": 2 * head.weight}, assign=True),
        lambda head: head.to(torch.bfloat16),
    ],
)
def test_logits_read_after_the_heads_weight_was_replaced_are_refused(pair, inputs, replace):
    patched = pair[1].eval()
    with torch.no_grad():
        outputs = patched(**inputs)
    replace(patched.lm_head)
    with pytest.raises(RuntimeError, match="the head's weight or bias has changed"):
        outputs.logits + 0


def test_a_users_hook_that_changes_the_heads_input_runs_once(pair, inputs):
    for model in pair:
        model.lm_head.register_forward_pre_hook(lambda head, args: (2 * args[0],))
    with pytest.warns(UserWarning, match="a hook on lm_head may see or change logits"):
        logits = [model(**inputs).logits + 0 for model in pair]
    torch.testing.assert_close(*logits)


def test_logits_read_after_the_hidden_states_changed_are_refused(pair, inputs):
    outputs = pair[1](**inputs, output_hidden_states=True)
    with torch.no_grad():
        outputs.hidden_states[-1].mul_(2)
    with pytest.raises(RuntimeError, match="the head's input was changed in place"):
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


def test_a_gradient_penalty_is_refused_not_left_out(pair, inputs):
    """Its gradient would reach the head through what backward computes, which has no derivative."""
    embedded = pair[1].model.embed_tokens(inputs["input_ids"])
    loss = pair[1](inputs_embeds=embedded, labels=inputs["labels"]).loss
    (gradient,) = torch.autograd.grad(loss, embedded, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + gradient.square().sum()).backward()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("items", [None, torch.tensor(11)], ids=["mean", "items"])
def test_autocast_with_fp32_master_weights(pair, inputs, device, dtype, bias, items):
    for model in pair:
        if bias:
            model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, TINY["vocab_size"], device=device))
    losses = []
    for model in pair:
        with torch.autocast(device.type, dtype):
            outputs = model(**inputs, num_items_in_batch=items)
            assert outputs.logits.dtype == dtype
        outputs.loss.backward()
        losses.append(outputs.loss)
    exact = in_fp64(pair[0])
    exact.zero_grad()
    wanted = exact(**inputs, num_items_in_batch=items).loss
    wanted.backward()
    assert losses[1].dtype == torch.float32
    assert_as_exact_as(losses[1], losses[0], wanted, "loss", depth=MODEL_DEPTH, computed_in=dtype)
    named = zip(pair[1].named_parameters(), pair[0].parameters(), exact.parameters(), strict=True)
    gradients = {name: (ours.grad, theirs.grad, e.grad) for (name, ours), theirs, e in named}
    assert gradients["lm_head.weight"][0].dtype == torch.float32
    assert_each_as_exact_as(gradients, depth=MODEL_DEPTH, alone_from=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_of_a_forward_under_autocast_are_the_same_outside_of_it(pair, inputs, device, dtype):
    with torch.autocast(device.type, dtype):
        stock, patched = (model(**inputs).logits for model in pair)
    assert torch.equal(patched + 0, stock)


def test_a_frozen_head_gets_no_gradient(pair, inputs):
    for model in pair:
        model.lm_head.weight.requires_grad_(False)
        model(**inputs).loss.backward()
    assert pair[1].lm_head.weight.grad is None
    for ours, theirs in zip(pair[1].model.parameters(), pair[0].model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_head_costs_no_memory_for_a_gradient(pair, inputs, allocations, frozen):
    patched = pair[1].requires_grad_(False)
    patched.model.norm.weight.requires_grad_(True)
    head = patched.lm_head.weight.requires_grad_(not frozen)
    largest = max(allocations(lambda: patched(**inputs).loss.backward()).sizes)
    assert (largest < head.numel() * head.element_size()) == frozen


def test_an_evaluation_that_wants_the_loss_takes_no_more_than_a_training_forward(pair, device, allocations, chunk_rows):
    chunk_rows(128)
    inputs = batch(TINY["vocab_size"], device, rows=48, length=16)
    logits = inputs["input_ids"].numel() * TINY["vocab_size"] * 4
    patched = pair[1]
    training = allocations(lambda: patched(**inputs))
    with torch.no_grad():
        evaluation = allocations(lambda: patched.eval()(**inputs).loss)
        reading = allocations(lambda: patched(**inputs).logits + 0)
    assert evaluation.peak <= training.peak
    assert max(evaluation.sizes) < logits <= max(reading.sizes)


def of_fsdp(hook):
    """A hook that gathers and frees a sharded weight, by where it is defined."""
    hook.__module__ = "torch.distributed.fsdp._fully_shard"
    return hook


def test_a_second_call_of_the_head_gets_logits(pair, inputs):
    """The loss is taken from the first call; whoever calls the head again meets logits."""
    patched = pair[1]
    seen: list[int] = []
    patched.lm_head.register_forward_hook(of_fsdp(lambda m, args, out: seen.append(out.shape[-1])))
    outputs = patched(**inputs)
    outputs.logits + 0
    assert seen == [0, TINY["vocab_size"]]


def test_backward_enters_the_head_through_its_output(pair, inputs):
    """FSDP gathers a head of its own when the gradient of the head's output is computed, before the loss's backward."""
    patched, order = pair[1], []

    def watch(module, args, output):
        output.register_hook(lambda grad: order.append("output"))

    patched.lm_head.register_forward_hook(of_fsdp(watch))
    patched.lm_head.weight.register_hook(lambda g: order.append("weight"))
    patched(**inputs).loss.backward()
    assert order == ["output", "weight"]


@pytest.mark.parametrize("training", [True, False])
def test_an_output_is_what_stock_returns(pair, inputs, training):
    """As a tuple, indexed, pickled and copied; with the logits of the positions that were asked for."""
    for model in pair:
        model.train(training).requires_grad_(training)
    stock, patched = (model(**inputs, use_cache=False) for model in pair)
    assert list(patched) == list(stock)
    for ours, theirs in zip(patched.to_tuple(), stock.to_tuple(), strict=True):
        torch.testing.assert_close(ours + 0, theirs + 0)
    loss, logits = pair[1](**inputs, use_cache=False, return_dict=False)
    torch.testing.assert_close(loss, stock.loss)
    assert isinstance(logits, LazyLogits)
    torch.testing.assert_close(logits[..., :-1, :].argmax(-1), stock[1][..., :-1, :].argmax(-1))
    copied = pickle.loads(pickle.dumps(patched))
    torch.testing.assert_close(copied.logits, stock.logits)
    if not training:  # torch copies no tensor that has a graph
        torch.testing.assert_close(copy.deepcopy(patched).logits, stock.logits)


def test_logits_of_the_positions_that_are_kept(pair, inputs):
    for keep in (4, torch.tensor([1, 3, 4, 7], device=inputs["labels"].device)):
        shifted = inputs["labels"][:, :4].contiguous()
        stock, patched = (model(**inputs, logits_to_keep=keep, shift_labels=shifted) for model in pair)
        assert isinstance(patched.logits, LazyLogits)
        assert patched.logits.shape == (2, 4, TINY["vocab_size"])
        torch.testing.assert_close(patched.loss, stock.loss)
        torch.testing.assert_close(patched.logits + 0, stock.logits)


def test_a_loss_of_logits_that_were_read_trains_as_stock_does(pair, inputs):
    for model in pair:
        model.zero_grad()
        outputs = model(**inputs)
        (outputs.loss + outputs.logits.float().logsumexp(-1).mean()).backward()
    for ours, theirs in zip(pair[1].parameters(), pair[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
