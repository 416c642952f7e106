"""What another library has replaced in transformers for the whole process: it runs, and the report says so."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss import loss_utils
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
)
from transformers.utils import ModelOutput

from adapted_models import LLAMA, llama
from liger.layers import RMSNorm
from liger.patch import apply_adapters
from liger.subclass import helpers, layer_class
from liger.testing.tiny import batch

pytestmark = pytest.mark.usefixtures("no_interpreter")


def apply(model):
    return apply_adapters(model, [LLAMA])


def declined(patch):
    return {(d.kind, d.cls, d.reason) for d in patch.declined}


class OthersRMSNorm(nn.Module):
    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        return hidden_states * 0 + self.weight


class OthersMLP(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return x * 0


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


@pytest.mark.parametrize("first", ["replaced", "applied"])
def test_what_a_function_calls_that_an_op_stands_for_is_heard(device, monkeypatch, first):
    model, stock = llama(device), llama(device)
    model.load_state_dict(stock.state_dict())
    if first == "applied":
        apply(model)
    monkeypatch.setattr(modeling_llama, "rotate_half", doubled(modeling_llama.rotate_half))
    expected = stock(**batch(99, device)).loss
    if first == "replaced":
        reasons = {d.reason for d in apply(model).declined if d.kind == "rope"}
        place = "transformers.models.llama.modeling_llama's own rotate_half"
        assert reasons == {f"apply_rotary_pos_emb calls {__name__}.doubled.<locals>.<lambda> in the place of {place}"}
    torch.testing.assert_close(model(**batch(99, device)).loss, expected)
    monkeypatch.undo()
    torch.testing.assert_close(model(**batch(99, device)).loss, stock(**batch(99, device)).loss)


def test_an_activation_that_was_replaced_later_runs(device, monkeypatch):
    model, stock = llama(device), llama(device)
    model.load_state_dict(stock.state_dict())
    apply(model)
    act = type(model.model.layers[0].mlp.act_fn)
    monkeypatch.setattr(act, "forward", doubled(act.forward))
    torch.testing.assert_close(model(**batch(99, device)).loss, stock(**batch(99, device)).loss)


class Doubled:
    """A function that is none."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **kwargs):
        return 2 * self.function(*args, **kwargs)


def wrapped(function):
    @functools.wraps(function)
    def called(q, k, *args, **kwargs):
        return function(2 * q, k, *args, **kwargs)

    return called


@pytest.mark.parametrize(("name", "replace"), [("rotate_half", Doubled), ("apply_rotary_pos_emb", wrapped)])
@pytest.mark.parametrize("first", ["replaced", "applied"])
def test_what_hides_what_it_is_is_heard(device, monkeypatch, name, replace, first):
    model, stock = llama(device), llama(device)
    model.load_state_dict(stock.state_dict())
    if first == "applied":
        apply(model)
    before = stock(**batch(99, device)).loss
    monkeypatch.setattr(modeling_llama, name, replace(getattr(modeling_llama, name)))
    if first == "replaced":
        assert "rope" in {d.kind for d in apply(model).declined}
    expected = stock(**batch(99, device)).loss
    torch.testing.assert_close(model(**batch(99, device)).loss, expected)
    assert abs(expected - before) > 1e-4


def test_a_forward_without_code_is_declined(device, monkeypatch):
    monkeypatch.setattr(LlamaRMSNorm, "forward", torch.relu)
    monkeypatch.setattr(LlamaMLP, "forward", Doubled(LlamaMLP.forward))
    assert {d.kind for d in apply(llama(device)).declined} == {"norm", "mlp"}


def test_hooks_on_all_modules_see_the_activation(device):
    model, stock = llama(device), llama(device)
    model.load_state_dict(stock.state_dict())
    with FlopCounterMode(display=False):
        assert not apply(model).declined
    acts = {module.mlp.act_fn for m in (model, stock) for module in m.model.layers}
    hook = nn.modules.module.register_module_forward_hook(lambda m, _, output: 2 * output if m in acts else None)
    try:
        losses = [m(**batch(99, device)).loss for m in (model, stock)]
    finally:
        hook.remove()
    torch.testing.assert_close(*losses)
    assert not torch.equal(losses[0], stock(**batch(99, device)).loss)


def test_a_helper_of_a_method_that_was_replaced_later_runs(device, monkeypatch):
    from transformers.models.gemma2 import modeling_gemma2 as gemma2

    norm = gemma2.Gemma2RMSNorm(16).to(device)
    x = torch.randn(3, 16, device=device)
    norm.__class__ = layer_class(gemma2.Gemma2RMSNorm, RMSNorm(cast="gemma", offset=1.0))
    assert helpers(gemma2.Gemma2RMSNorm, "forward") == ("_norm",)
    before = norm(x)
    monkeypatch.setattr(gemma2.Gemma2RMSNorm, "_norm", doubled(gemma2.Gemma2RMSNorm._norm))
    torch.testing.assert_close(norm(x), 2 * before)


@pytest.fixture
def replaced_classes(monkeypatch):
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", OthersRMSNorm)
    monkeypatch.setattr(modeling_llama, "LlamaMLP", OthersMLP)


def test_a_model_of_classes_that_took_the_places_of_transformers_keeps_them_and_says_so(device, replaced_classes):
    model = llama(device)
    patch = apply(model)
    held = "transformers.models.llama.modeling_llama holds {}.{} in its own class's place"
    assert declined(patch) == {
        ("norm", "LlamaRMSNorm", held.format(__name__, "OthersRMSNorm")),
        ("mlp", "LlamaMLP", held.format(__name__, "OthersMLP")),
    }
    assert type(model.model.norm) is OthersRMSNorm


def test_a_model_built_before_its_classes_were_replaced_is_swapped(device, request):
    model = llama(device)
    request.getfixturevalue("replaced_classes")
    patch = apply(model)
    assert not patch.declined
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"}
    patch.undo()
    assert type(model.model.norm) is LlamaRMSNorm


def zero(self, hidden_states):
    return hidden_states * 0


def wrapping(stock):
    @functools.wraps(stock)
    def forward(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    return forward


@pytest.mark.parametrize("wrap", [False, True], ids=["another", "wrapped"])
@pytest.mark.parametrize(
    ("cls", "kind"),
    [(LlamaRMSNorm, "norm"), (LlamaMLP, "mlp"), (LlamaAttention, "rope"), (LlamaForCausalLM, "loss")],
)
def test_a_forward_that_somebody_put_into_the_class_is_kept(device, monkeypatch, cls, kind, wrap):
    model = llama(device)
    monkeypatch.setattr(cls, "forward", wrapping(cls.forward) if wrap else zero)
    patch = apply(model)
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"} - {kind}
    replaced = f"{cls.__name__}.forward was replaced by {__name__}."
    assert [reason for _, _, reason in declined(patch) if reason.startswith(replaced)]


def test_a_replaced_forward_of_every_linear_is_not_passed_over_by_the_head(device, monkeypatch):
    model, inputs = llama(device), batch(99, device)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, input: torch.nn.functional.linear(input, self.weight) * 0.5)
    stock = model(**inputs).loss
    patch = apply(model)
    assert any("Linear.forward was replaced" in d.reason for d in patch.declined)
    torch.testing.assert_close(model(**inputs).loss, stock)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_on_an_activation_is_called_by_the_model_and_by_nobody_else(device, kind):
    model, inputs, calls = llama(device), batch(99, device), []
    act_fn = model.model.layers[1].mlp.act_fn
    getattr(act_fn, f"register_{kind}")(lambda *_: calls.append(kind))
    patch = apply(model)
    assert declined(patch) == {("mlp", "LlamaMLP", "a hook on its act_fn wants to be called")}
    assert not calls
    model(**inputs).loss.backward()
    assert calls == [kind]


def halved(result):
    if isinstance(result, torch.Tensor):
        return result * 0.5
    if isinstance(result, ModelOutput):
        return type(result)(**{name: halved(value) for name, value in result.items()})
    return tuple(map(halved, result)) if isinstance(result, tuple) else result


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        *(
            (cls, "forward")
            for cls in (LlamaForCausalLM, LlamaModel, LlamaAttention, LlamaMLP, LlamaRMSNorm, nn.Linear)
        ),
        *((modeling_llama, function) for function in ("eager_attention_forward", "apply_rotary_pos_emb")),
        (loss_utils, "fixed_cross_entropy"),
        (torch.nn.functional, "cross_entropy"),
    ],
    ids=lambda place: getattr(place, "__name__", place),
)
@pytest.mark.filterwarnings("ignore:liger. .* holds .*, so the model's own loss runs")
def test_what_is_replaced_after_apply_runs_too(device, monkeypatch, place, name, recompute):
    stock, patched = llama(device), llama(device)
    assert not apply_adapters(patched, [LLAMA], recompute=recompute).declined
    inputs, own = batch(99, device), getattr(place, name)
    before = patched(**inputs).loss

    def replacement(*args, **kwargs):
        return halved(own(*args, **kwargs))

    with monkeypatch.context() as context:
        context.setattr(place, name, replacement)
        losses = [model(**inputs).loss for model in (stock, patched)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        assert not torch.isclose(losses[1], before, rtol=1e-4)
    torch.testing.assert_close(patched(**inputs).loss, before, rtol=1e-5, atol=1e-5)
