"""The loss inside the head: which loss it is, and that nothing asked of it is dropped."""

from __future__ import annotations

import copy
import functools
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, modeling_utils
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from adapted_models import LLAMA_HEAD, llama
from liger.causal_lm import CausalLM
from liger.lazy_logits import LazyLogits
from liger.patch import apply_adapters
from liger.subclass import head_class, model_class
from liger.testing import TINY
from liger.testing.tiny import build


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
        {"num_items_in_batch": torch.tensor([3])},
        {"num_items_in_batch": torch.tensor(3, dtype=torch.int32)},
        {"num_items_in_batch": torch.tensor(3, dtype=torch.bfloat16)},
        {"num_items_in_batch": torch.tensor(3, dtype=torch.float64)},
        {"logits_to_keep": 0},
        {"output_hidden_states": True, "cu_seq_lens_q": torch.tensor([0, 9]), "max_length_q": 9},
    ],
    ids=str,
)
def test_options_of_the_loss(device, inputs, loss, extra):
    stock = llama(device)
    patched = copy.deepcopy(stock)
    apply_adapters(patched, [LLAMA_HEAD], loss=loss)
    if "ignore_index" in extra:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, extra["ignore_index"])
    assert_same_loss_and_gradients((stock, patched), **inputs, **extra)


@pytest.fixture
def heard(monkeypatch):
    """What reaches the innermost of transformers' losses as keywords."""
    from transformers.loss import loss_utils

    heard, own = {}, loss_utils.fixed_cross_entropy

    def listening(*args, **kwargs):
        heard.update(kwargs)
        return own(*args, **kwargs)

    like_their_own = FunctionType(listening.__code__, vars(loss_utils), "", None, listening.__closure__)
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", like_their_own)
    return heard


def test_a_keyword_that_the_fused_loss_does_not_know_reaches_the_models_own(pair, inputs, heard):
    with pytest.warns(UserWarning, match="does not know label_smoothing, so the model's own runs"):
        assert_same_loss_and_gradients(pair, **inputs, label_smoothing=0.1)
    assert heard == {"label_smoothing": 0.1}
    heard.clear()
    with pytest.warns(UserWarning, match="does not know label_smoothing"):
        assert type(pair[1](**inputs, label_smoothing=0.1).logits) is torch.Tensor
    assert heard == {"label_smoothing": 0.1}


@pytest.mark.parametrize(
    "given",
    [
        {"label_smoothing": 0.1},
        {"ignore_index": 5},
        {"num_items_in_batch": 3},
        {"shift_labels": torch.arange(18).view(2, 9)},
        {"labels": torch.arange(18).view(2, 9)},
    ],
    ids=", ".join,
)
def test_what_the_model_itself_gives_its_loss_is_not_dropped(device, inputs, heard, given):
    class Giving(LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = self.loss_function(logits, **{"labels": labels, "vocab_size": self.vocab_size, **kwargs, **given})
            return CausalLMOutputWithPast(loss=loss, logits=logits)

    stock = build(Giving, LlamaConfig(**TINY), device)
    patched = copy.deepcopy(stock)
    spec = CausalLM("Giving")
    patched.lm_head.__class__ = head_class(nn.Linear, spec)
    patched.__class__ = model_class(Giving, spec)
    inputs["labels"] = inputs["labels"].abs() % TINY["vocab_size"]  # none is ignored
    inputs["labels"][0, 1:4] = 5
    assert_same_loss_and_gradients((stock, patched), **inputs)
    heard.clear()
    patched(**inputs)
    assert heard == {name: value for name, value in given.items() if name == "label_smoothing"}


@pytest.mark.parametrize("name", ["ForCausalLMLoss", "fixed_cross_entropy", "cross_entropy"])
def test_a_loss_that_somebody_has_put_in_the_place_of_theirs_is_kept(device, inputs, monkeypatch, name):
    from transformers.loss import loss_utils

    place = torch.nn.functional if name == "cross_entropy" else loss_utils
    own = getattr(place, name)

    @functools.wraps(own)
    def doubled(*args, **kwargs):
        return 2 * own(*args, **kwargs)

    monkeypatch.setattr(place, name, doubled)
    if name == "ForCausalLMLoss":
        monkeypatch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", doubled)
    stock = llama(device)
    patched = copy.deepcopy(stock)
    (declined,) = apply_adapters(patched, [LLAMA_HEAD]).declined
    assert re.search(rf"holds .*test_causal_lm\..* in the place of its own {name}", declined.reason)
    assert_same_loss_and_gradients((stock, patched), **inputs)


def test_what_every_model_passes_on_disables_nothing(pair, inputs):
    packed = {"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 9]), "seq_idx": None}
    outputs = pair[1](**inputs, **packed, max_length_q=9, max_length_k=9, is_causal=True, output_hidden_states=True)
    assert isinstance(outputs.logits, LazyLogits)
    assert len(outputs.hidden_states) == 3


def test_labels_given_by_position(pair, inputs):
    stock, patched = (model(inputs["input_ids"], None, None, None, None, inputs["labels"]).loss for model in pair)
    torch.testing.assert_close(patched, stock)
    assert isinstance(pair[1](inputs["input_ids"], None, None, None, None, inputs["labels"]).logits, LazyLogits)


def test_shift_labels_that_keep_some_positions(pair, inputs):
    """A 2-D mask of positions, and labels for these alone: as packed training asks for."""
    if not hasattr(modeling_utils, "slice_logits_to_keep"):
        pytest.skip("this transformers takes no mask of positions")
    keep = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    keep[:, ::2] = True
    shifted = inputs["labels"].roll(-1, -1)[keep]
    assert_same_loss_and_gradients(pair, **inputs, logits_to_keep=keep, shift_labels=shifted)


def test_shift_labels_alone_are_no_request_for_a_loss(pair, inputs):
    for model in pair:
        assert model(inputs["input_ids"], shift_labels=inputs["labels"]).loss is None


def test_packed_sequences(pair, inputs):
    """Two sequences in one row, told apart by positions that begin again."""
    ids, labels = inputs["input_ids"].view(1, -1), inputs["labels"].view(1, -1).clone()
    labels[0, 9] = -100
    positions = torch.arange(9, device=ids.device).repeat(2).view(1, -1)
    assert_same_loss_and_gradients(pair, input_ids=ids, labels=labels, position_ids=positions)
    apart = pair[1](inputs["input_ids"], labels=inputs["labels"].clone()).loss
    torch.testing.assert_close(pair[1](ids, labels=labels, position_ids=positions, use_cache=False).loss, apart)


@pytest.mark.gpu
def test_a_denominator_on_another_device(pair, inputs):
    assert_same_loss_and_gradients(pair, **inputs, num_items_in_batch=torch.tensor(3))


def test_several_numbers_of_items_divide_as_in_the_models_own_loss(pair, inputs):
    stock, patched = (model(**inputs, num_items_in_batch=torch.tensor([3, 4])).loss for model in pair)
    assert patched.shape == (2,)
    torch.testing.assert_close(patched, stock)


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


@pytest.mark.parametrize("kind", ["forward", "full_backward"])
def test_a_users_hook_on_the_head_sees_logits(pair, inputs, kind):
    seen: list[torch.Tensor] = []
    for model in pair:
        hook = functools.partial(lambda *args: seen.append(args[-1]))
        getattr(model.lm_head, f"register_{kind}_hook")(hook)
    with pytest.warns(UserWarning, match="a hook on lm_head may see or change logits"):
        assert_same_loss_and_gradients(pair, **inputs)
    stock, patched = (value[0] if isinstance(value, tuple) else value for value in seen)
    torch.testing.assert_close(patched, stock)


def test_an_exception_in_the_forward_leaves_nothing_behind(pair, inputs):
    patched = pair[1]
    before = [sorted(vars(m)) for m in patched.modules()]
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        patched(labels=inputs["labels"])
    assert [sorted(vars(m)) for m in patched.modules()] == before


@pytest.mark.usefixtures("no_interpreter")
def test_forwards_in_two_threads_take_their_own_labels(pair, inputs):
    patched, both = pair[1], threading.Barrier(2, timeout=60)
    labels = [inputs["labels"], inputs["labels"].flip(0)]

    def loss(labels):
        return patched(inputs["input_ids"], labels=labels).loss

    def wait(*_):
        both.wait()  # before the head, so that each has asked for a loss when the first computes one

    expected = [*map(loss, labels)]
    patched.model.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(loss, labels)] == expected


def test_a_forward_inside_a_forward_takes_its_own_labels(pair, inputs):
    patched, inner = pair[1], []
    ids, others = inputs["input_ids"], inputs["labels"].flip(0)
    expected = [patched(ids, labels=labels).loss for labels in (inputs["labels"], others)]

    def call_again(*_):
        if not inner:
            inner.append(None)
            inner[:] = patched(ids, labels=others), patched(ids)

    patched.model.register_forward_pre_hook(call_again)
    assert [patched(**inputs).loss, inner[0].loss] == expected
    assert type(inner[1].logits) is torch.Tensor
    assert inner[1].loss is None


def test_logits_of_an_earlier_forward_may_be_read_inside_another(pair, inputs):
    stock, patched = pair
    ids, others = inputs["input_ids"], inputs["input_ids"].flip(0)
    earlier, read = patched(others, labels=inputs["labels"]).logits, []
    patched.model.register_forward_pre_hook(lambda *_: read.append(earlier + 0))
    assert_same_loss_and_gradients(pair, **inputs)
    torch.testing.assert_close(read[0], stock(others).logits)
    assert isinstance(patched(ids, labels=inputs["labels"]).logits, LazyLogits)


def test_without_labels_everything_is_stock_bit_for_bit(pair, inputs):
    ids = inputs["input_ids"]
    for train in (True, False):
        stock, patched = (model.train(train)(ids, logits_to_keep=3) for model in pair)
        assert type(patched.logits) is torch.Tensor
        assert torch.equal(patched.logits, stock.logits)
    stock, patched = (model.generate(ids, max_new_tokens=5, do_sample=False) for model in pair)
    assert torch.equal(patched, stock)
