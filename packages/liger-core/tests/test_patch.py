"""apply: what it swaps, what it declines, and that it never changes what it does not understand."""

from __future__ import annotations

import copy
import functools
import logging
import types

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from adapted_models import LLAMA, llama
from liger.adapter import Layer
from liger.layers import LayerNorm, RMSNorm
from liger.patch import apply_adapters
from liger.subclass import layer_class
from liger.testing.tiny import batch


@pytest.fixture
def model(device):
    return llama(device)


def apply(model, **switches):
    return apply_adapters(model, [LLAMA], **switches)


def reasons(patch):
    return {d.reason for d in patch.declined}


def test_report(model):
    assert str(apply(model)).splitlines() == [
        "liger.Patch",
        "  loss  1 × Linear → linear_cross_entropy",
        "  loss  1 × LlamaForCausalLM → the loss of its head",
        "  rope  2 × LlamaAttention → rotary",
        "  mlp   2 × LlamaMLP → swiglu",
        "  norm  5 × LlamaRMSNorm → rms_norm",
    ]


@pytest.mark.parametrize(("switch", "kind"), [("rope", "rope"), ("norm", "norm"), ("mlp", "mlp"), ("loss", "loss")])
def test_each_switch_turns_its_kind_off(model, switch, kind):
    patch = apply(model, **{switch: None if switch == "loss" else False})
    assert {s.kind for s in patch.swapped} == {"rope", "norm", "mlp", "loss"} - {kind}


def test_full_loss_leaves_the_head(model):
    patch = apply(model, rope=False, norm=False, mlp=False, loss="full")
    assert [s.name for s in patch.swapped] == [""]
    assert type(model.lm_head) is nn.Linear


def test_unknown_loss_is_named(model):
    with pytest.raises(ValueError, match="loss must be 'linear', 'full' or None, not 'chunked'"):
        apply(model, loss="chunked")


def test_what_is_asked_for_by_name_and_cannot_be_had_raises_and_changes_nothing(device):
    model = llama(device, hidden_act="relu")
    before = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="mlp=True was asked for .* hidden_act='relu' has no kernel"):
        apply(model, mlp=True)
    assert [type(m) for m in model.modules()] == before
    assert reasons(apply(model)) == {"hidden_act='relu' has no kernel (known: silu, swish, gelu_pytorch_tanh, gelu)"}


def test_linear_loss_asked_for_on_a_head_that_is_no_linear(model):
    class Scaled(nn.Linear):
        pass

    model.lm_head.__class__ = Scaled
    with pytest.raises(ValueError, match="loss='linear' was asked for .*lm_head is .*Scaled, not torch.nn.Linear"):
        apply(model, loss="linear")
    patch = apply(model)
    assert any("Scaled, not torch.nn.Linear" in reason for reason in reasons(patch))
    assert [s.runs for s in patch.swapped if s.kind == "loss"] == ["cross_entropy of the logits"]


def test_another_loss_function_keeps_it(model):
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 42
    patch = apply(model)
    assert any("not ForCausalLMLoss" in reason for reason in reasons(patch))
    assert model(**batch(99, model.device)).loss == 42


def test_a_loss_function_set_after_apply_is_the_one_that_runs(model):
    apply(model)
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + logits.shape[-1]
    assert model(**batch(99, model.device)).loss == 99


def test_an_activation_that_the_config_does_not_name(model):
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    patch = apply(model)
    assert [(d.name, d.reason) for d in patch.declined] == [("model.layers.0.mlp", "its act_fn does not compute silu")]


def test_a_dropout_inside_the_mlp(model):
    model.model.layers[0].mlp.dropout = nn.Dropout(0.1)
    assert {d.name for d in apply(model).declined} == {"model.layers.0.mlp"}


def test_a_norm_with_a_parameter_more(model):
    model.model.norm.bias = nn.Parameter(torch.zeros(48))
    assert reasons(apply(model)) == {"has parameters that RMSNorm does not know: bias"}


def zeros(module, x):
    return x * 0


@pytest.mark.parametrize(
    "bind", [types.MethodType, lambda f, module: functools.partial(f, module)], ids=["method", "partial"]
)
def test_a_forward_on_the_instance_is_kept(model, bind):
    norm = model.model.norm
    norm.forward = bind(zeros, norm)
    (declined,) = apply(model).declined
    assert declined.name == "model.norm"
    assert declined.reason == f"its forward was replaced on the instance by {__name__}.zeros"
    assert not norm(torch.ones(1, 48)).any()


def test_a_subclass_with_a_forward_of_its_own_is_kept(model):
    class Doubled(LlamaRMSNorm):
        def forward(self, hidden_states):
            return 2 * super().forward(hidden_states)

    model.model.norm.__class__ = Doubled
    patch = apply(model)
    assert [d.name for d in patch.declined] == ["model.norm"]
    assert "Doubled overrides its forward" in patch.declined[0].reason


def test_a_subclass_that_only_adds_is_swapped(model):
    class Named(LlamaMLP):
        label = "mine"

    model.model.layers[1].mlp.__class__ = Named
    assert not apply(model).declined
    assert model.model.layers[1].mlp.label == "mine"
    assert isinstance(model.model.layers[1].mlp, Named)


def test_a_rotary_function_that_somebody_replaced_is_kept(model, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))
    patch = apply(model)
    assert {d.kind for d in patch.declined} == {"rope"}
    (reason,) = reasons(patch)
    assert reason.startswith(f"{modeling_llama.__name__} holds {__name__}.test_a_rotary_function")
    assert reason.endswith("<lambda> in its own function's place")


def test_undo_refuses_when_something_swapped_the_class_again(model):
    patch = apply(model)
    norm = model.model.norm
    norm.__class__ = type("Later", (type(norm),), {})
    with pytest.raises(RuntimeError, match="cannot undo: a LlamaRMSNorm .* has become .*Later since"):
        patch.undo()
    assert type(model.model.layers[0].input_layernorm) is not LlamaRMSNorm, "undo must be all or nothing"


def test_undo_takes_off_the_forwards_that_removed_hooks_have_left(model, no_interpreter):
    patch = apply(model)
    for module in (model.lm_head, model.model.norm):
        module.forward = module.forward  # as accelerate's hooks do when they are removed
    patch.undo()
    assert not {"forward"} & {*vars(model.lm_head), *vars(model.model.norm)}
    inputs = batch(99, model.device)
    assert model(**inputs).loss.isfinite()


def test_undo_refuses_where_a_forward_on_the_instance_may_call_the_kernels(model):
    patch = apply(model)
    model.forward, kept = functools.partial(model.forward), model.model.norm.forward  # a model's may be wrapped
    model.model.norm.forward = lambda x: kept(x)
    with pytest.raises(
        RuntimeError, match="cannot undo: the forward of a LlamaRMSNorm was replaced on the instance by"
    ):
        patch.undo()
    assert type(model.lm_head) is not nn.Linear, "undo must be all or nothing"
    del model.model.norm.forward
    patch.undo()
    assert type(model.lm_head) is nn.Linear


def test_patches_of_different_kinds_stack_and_come_off_in_any_order(model):
    before = [type(m) for m in model.modules()]
    norms = apply(model, rope=False, mlp=False, loss=None)
    rest = apply(model, norm=False)
    norms.undo()
    rest.undo()
    rest.undo()
    assert [type(m) for m in model.modules()] == before


def test_inside_a_wrapper(model):
    wrapper = nn.ModuleDict({"wrapped": model})
    assert all(s.name.startswith("wrapped") for s in apply(wrapper).swapped)


def test_modules_called_by_keyword(model):
    apply(model)
    x = torch.randn(2, 3, 48, device=model.device)
    assert torch.equal(model.model.norm(hidden_states=x), model.model.norm(x))
    assert torch.equal(model.model.layers[0].mlp(x=x), model.model.layers[0].mlp(x))


def test_a_copy_trains_by_itself(model):
    apply(model)
    twin = copy.deepcopy(model)
    twin(**batch(99, model.device)).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())


def said(caplog, level):
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_one_line_sums_up_and_each_module_has_one_of_its_own(model, caplog):
    caplog.set_level(logging.DEBUG, "liger")
    patch = apply(model, skip=["model.norm"])
    assert said(caplog, logging.INFO) == [
        "LlamaForCausalLM: swapped 2 loss, 2 rope, 2 mlp, 4 norm; declined 1",
    ]
    lines = said(caplog, logging.DEBUG)
    assert len(lines) == len(patch.swapped) + 1
    assert "model.layers.0.self_attn: LlamaAttention → rotary" in lines
    assert "the model itself: LlamaForCausalLM → the loss of its head" in lines
    assert "model.norm: LlamaRMSNorm declined: skipped by 'model.norm'" in lines
    assert {record.name for record in caplog.records} == {"liger.patch"}
    assert not said(caplog, logging.WARNING)


def test_a_loss_that_is_not_fused_is_a_warning_unless_it_was_asked_for(model, caplog):
    caplog.set_level(logging.INFO, "liger")
    model.lm_head = nn.Sequential(model.lm_head)
    apply(model).undo()
    assert said(caplog, logging.WARNING) == [
        "LlamaForCausalLM: the head and its loss are not fused, because lm_head is "
        "torch.nn.modules.container.Sequential, not torch.nn.Linear"
    ]
    caplog.clear()
    for asked in ({"loss": "full"}, {"loss": None}, {"skip": ["lm_head"]}):
        apply(model, **asked).undo()
    assert not said(caplog, logging.WARNING)


def test_nothing_is_printed_where_logging_is_not_set_up(model, capfd, monkeypatch):
    """Without a handler of ours Python prints warnings by itself."""
    monkeypatch.setattr(logging.getLogger("liger"), "propagate", False)
    model.lm_head = nn.Sequential(model.lm_head)
    apply(model)
    assert capfd.readouterr() == ("", "")


def test_repr_shows_the_kernels_until_undo(model):
    before = repr(model)
    patch = apply(model, recompute=True)
    ours, stock = repr(model).splitlines(), before.splitlines()
    assert [line for line in ours if line not in stock] == [
        "  liger=loss",
        "    liger=recompute",
        "          liger=rotary",
        "          liger=swiglu",
        "        (input_layernorm): LlamaRMSNorm((48,), eps=1e-06, liger=rms_norm)",
        "        (post_attention_layernorm): LlamaRMSNorm((48,), eps=1e-06, liger=rms_norm)",
        "    (norm): LlamaRMSNorm((48,), eps=1e-06, liger=rms_norm)",
        "  (lm_head): Linear(in_features=48, out_features=99, bias=False, liger=linear_cross_entropy)",
    ]
    patch.undo()
    assert repr(model) == before


def test_repr_names_the_op_that_runs(device):
    model = llama(device, hidden_act="gelu")
    apply(model)
    assert "liger=geglu" in repr(model)
    assert repr(layer_class(nn.LayerNorm, LayerNorm())(8)).endswith(", liger=layer_norm)")


def test_repr_of_a_layer_that_gives_no_name(device):
    class Doubled(RMSNorm):
        kernel = Layer.kernel

    assert (
        repr(layer_class(LlamaRMSNorm, Doubled("variance_epsilon"))(8))
        == "LlamaRMSNorm((8,), eps=1e-06, liger=Doubled)"
    )
