"""Layers and heads that LLaMA has none of: experts, fused and dropped-out MLPs, LayerNorm, an unshifted loss."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Phi3Config, PhiConfig, T5GemmaConfig, T5GemmaModuleConfig
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaForConditionalGeneration

from adapted_models import LLAMA, MIXTRAL, llama, mixtral, mixtral_config
from liger.adapter import Adapter
from liger.causal_lm import CausalLM
from liger.layers import Experts, FusedGatedMLP, GatedMLP, LayerNorm, RMSNorm, Stock
from liger.patch import apply_adapters
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build

PHI = Adapter(
    modeling="transformers.models.phi.modeling_phi",
    modules={"nn.LayerNorm": LayerNorm(), "PhiMLP": Stock("mlp", "has no gate")},
    functions={"apply_rotary_pos_emb": "is left alone here"},
    head=CausalLM("PhiForCausalLM"),
)
PHI3 = Adapter(modeling="transformers.models.phi3.modeling_phi3", modules={"Phi3MLP": FusedGatedMLP(act="hidden_act")})
T5GEMMA = Adapter(
    modeling="transformers.models.t5gemma.modeling_t5gemma",
    modules={"T5GemmaMLP": GatedMLP(act="hidden_activation", dropout="dropout")},
    head=CausalLM(
        "T5GemmaForConditionalGeneration",
        head="lm_head.out_proj",
        softcap="decoder.final_logit_softcapping",
        loss="ForMaskedLMLoss",
    ),
)


def t5gemma(**options):
    part = {**TINY, "hidden_activation": "gelu_pytorch_tanh", **options}
    return T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**part),
        decoder=T5GemmaModuleConfig(**part),
        vocab_size=TINY["vocab_size"],
        attn_implementation="eager",
    )


def pair(adapter, cls, config, device):
    stock = build(cls, config, device)
    patched = copy.deepcopy(stock)
    return stock, patched, apply_adapters(patched, [adapter])


class TestExperts(AdapterContract):
    adapter = MIXTRAL

    def config(self):
        return mixtral_config(output_router_logits=True, router_aux_loss_coef=0.5)


class TestDeclared(AdapterContract):
    adapter = PHI
    declines: ClassVar = {"PhiMLP": "^has no gate$", "rope": "^apply_rotary_pos_emb is left alone here$"}

    def config(self):
        return PhiConfig(**TINY)


def test_the_auxiliary_loss_is_added_to_ours(device, path):
    stock, patched, _ = pair(MIXTRAL, MixtralForCausalLM, mixtral_config(), device)
    inputs = batch(TINY["vocab_size"], device)
    with_router, without = (patched(**inputs, output_router_logits=on) for on in (True, False))
    assert with_router.aux_loss > 0
    expected = without.loss + stock.router_aux_loss_coef * with_router.aux_loss
    torch.testing.assert_close(with_router.loss, expected)


@pytest.mark.parametrize("dispatch", ["grouped_mm", "batched_mm"])
def test_each_dispatch_calls_the_gate(device, path, dispatch):
    stock, patched, patch = pair(MIXTRAL, MixtralForCausalLM, mixtral_config(experts_implementation=dispatch), device)
    assert not patch.declined
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


def test_experts_that_never_call_the_gate_are_declined(device):
    _, _, patch = pair(MIXTRAL, MixtralForCausalLM, mixtral_config(experts_implementation="eager"), device)
    assert {(d.kind, d.reason.partition(" (")[0]) for d in patch.declined} == {
        ("experts", "experts_implementation='eager' does not call _apply_gate")
    }


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("has_gate", False, "its experts have no gate"),
        ("is_concatenated", False, "its gate and up are interleaved"),
        ("act_fn", nn.ReLU(), "its act_fn does not compute silu"),
        ("_apply_gate", mixtral, f"its _apply_gate was replaced on the instance by {mixtral.__module__}.mixtral"),
    ],
)
def test_experts_of_another_make_are_declined(device, attribute, value, reason):
    model = mixtral(device)
    setattr(model.model.layers[0].mlp.experts, attribute, value)
    patch = apply_adapters(model, [MIXTRAL])
    assert [(d.name, d.reason) for d in patch.declined] == [("model.layers.0.mlp.experts", reason)]


class OneMoreSiLU(nn.SiLU):
    """Of a class that nobody knows."""


def test_an_activation_of_an_unknown_class_is_declined(device):
    model = llama(device)
    model.model.layers[0].mlp.act_fn = OneMoreSiLU()
    reasons = {d.name: d.reason for d in apply_adapters(model, [LLAMA]).declined}
    assert reasons == {"model.layers.0.mlp": "its act_fn is a OneMoreSiLU, which has no kernel"}


def test_an_activation_whose_forward_was_replaced_on_the_instance_is_declined(device):
    model = llama(device)
    model.model.layers[0].mlp.act_fn.forward = nn.functional.silu
    (reason,) = {d.reason for d in apply_adapters(model, [LLAMA]).declined}
    assert reason.startswith("its act_fn.forward was replaced on the instance by torch.nn.functional")


def test_gate_and_up_of_different_dtypes_are_multiplied_as_the_model_does(device, path):
    """As under autocast, where an adapter of PEFT's on one of the two returns fp32."""
    stock, patched = llama(device), llama(device)
    patched.load_state_dict(stock.state_dict())
    apply_adapters(patched, [LLAMA])
    for model in (stock, patched):
        model.to(torch.bfloat16)
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: output.float())
        model.model.layers[0].mlp.down_proj.float()
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, output: output.bfloat16())
    inputs = batch(99, device)
    torch.testing.assert_close(patched(**inputs).loss, stock(**inputs).loss, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "hidden_act", "gelu"),  # for another model, of the same config
        lambda model: setattr(model.config, "hidden_act", "relu"),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.ReLU()),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.SiLU()),
        lambda model: model.model.layers[0].mlp.act_fn.register_forward_hook(lambda module, args, output: 2 * output),
        lambda model: setattr(model.model.layers[0].mlp.act_fn, "forward", torch.relu),
    ],
)
def test_an_activation_is_the_modules_own_though_it_changes_later(device, path, change):
    stock, patched = llama(device), llama(device)
    patched.load_state_dict(stock.state_dict())
    apply_adapters(patched, [LLAMA])
    inputs = batch(99, device)
    for model in (stock, patched):
        change(model)
    torch.testing.assert_close(patched(**inputs).loss, stock(**inputs).loss, rtol=1e-4, atol=1e-4)


def test_experts_have_a_switch(device):
    model = mixtral(device)
    assert {s.kind for s in apply_adapters(model, [MIXTRAL], experts=False).swapped} == {"norm", "rope", "loss"}


def test_a_class_from_elsewhere_is_meant_only_as_a_part_of_the_adapters_own(device):
    """And only that class: neither what derives from it, nor the same class in another library's module."""

    class Derived(nn.LayerNorm):
        pass

    _, patched, patch = pair(PHI, PhiForCausalLM, PhiConfig(**TINY), device)
    norms = {"model.final_layernorm", "model.layers.0.input_layernorm", "model.layers.1.input_layernorm"}
    assert {s.name for s in patch.swapped if s.kind == "norm"} == norms
    patch.undo()
    patched.extra = nn.Sequential(nn.LayerNorm(4))
    patched.model.final_layernorm.__class__ = Derived
    patched.model.layers[0].input_layernorm = nn.LayerNorm((9, 48), device=device)
    patch = apply_adapters(patched, [PHI])
    assert {s.name for s in patch.swapped if s.kind == "norm"} == {"model.layers.1.input_layernorm"}
    assert [d.reason for d in patch.declined if d.kind == "norm"] == ["normalises over 2 dimensions"]
    assert apply_adapters(patched, [PHI]).already.count("model.layers.1.input_layernorm") == 1


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_norm_with_one_weight_for_all_columns_is_declined(device, shape):
    model = llama(device)
    model.model.norm.weight = nn.Parameter(torch.full(shape, 2.0, device=device))
    reasons = {d.name: d.reason for d in apply_adapters(model, [LLAMA]).declined}
    assert reasons == {"model.norm": "its weight is one number for all columns"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("cls", "layer"), [(nn.LayerNorm, LayerNorm()), (nn.RMSNorm, RMSNorm(cast="gemma"))])
def test_a_norm_of_torchs_returns_what_it_does_under_autocast(autocast, dtype, cls, layer):
    """On a GPU: fp32. There need not be one."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        torch.set_autocast_enabled("cuda", autocast)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        with FakeTensorMode(), torch.no_grad():
            module = cls(8, eps=1e-5, device="cuda", dtype=torch.float32 if autocast else dtype)
            x = torch.empty(4, 8, device="cuda", dtype=dtype)
            assert layer.forward(module, x).dtype == module(x).dtype
    finally:
        torch.set_autocast_enabled("cuda", was[0])
        torch.set_autocast_dtype("cuda", was[1])


def test_layer_norm_of_a_bare_module_is_not_touched(device):
    stock = build(PhiForCausalLM, PhiConfig(**TINY), device)
    wrapper = nn.Sequential(stock, nn.LayerNorm(4))
    assert "1" not in {s.name for s in apply_adapters(wrapper, [PHI]).swapped}


def test_gate_and_up_in_one_projection(device, path):
    config = Phi3Config(**{name: value for name, value in TINY.items() if name != "head_dim"})
    stock, patched, patch = pair(PHI3, Phi3ForCausalLM, config, device)
    assert [s.cls for s in patch.swapped] == ["Phi3MLP"] * 2
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gate_and_up_in_one_tensor_take_one_gradient(device, act):
    """Of two gradients autograd would make one, which moves half as many bytes again."""
    pytest.importorskip("triton")
    module = SimpleNamespace(
        act_fn=ACT2FN[act], activation_fn=ACT2FN[act], gate_up_proj=nn.Identity(), down_proj=nn.Identity()
    )
    gate_up = torch.randn(3, 8, device=device, requires_grad=True)
    for layer in (Experts(act="hidden_act"), FusedGatedMLP(act="hidden_act")):
        y = layer.forward(module, gate_up)
        (leaf, _), *others = y.grad_fn.next_functions
        assert leaf.variable is gate_up
        assert not others


@pytest.mark.parametrize("cap", [30.0, None])
def test_a_loss_that_does_not_shift(device, path, cap):
    stock, patched, patch = pair(T5GEMMA, T5GemmaForConditionalGeneration, t5gemma(final_logit_softcapping=cap), device)
    assert {s.cls for s in patch.swapped} == {"T5GemmaMLP", "Linear", "T5GemmaForConditionalGeneration"}
    inputs = batch(TINY["vocab_size"], device)
    for more in ({}, {"num_items_in_batch": 5}, {"shift_labels": inputs["labels"]}):
        assert_same_step(patched, stock, in_fp64(stock), {**inputs, **more})
    torch.testing.assert_close(patched(**inputs).logits + 0, stock(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_dropout_stands_between_the_product_and_the_last_projection(device):
    stock, patched, _ = pair(T5GEMMA, T5GemmaForConditionalGeneration, t5gemma(dropout_rate=0.5), device)
    x = torch.randn(2, 3, 48, device=device)
    results = []
    for model in (stock, patched):
        torch.manual_seed(0)
        results.append(model.model.decoder.layers[0].mlp(x))
    torch.testing.assert_close(*results)
    unknown = Adapter(modeling=T5GEMMA.modeling, modules={"T5GemmaMLP": GatedMLP(act="hidden_activation")})
    assert "holds act_fn, down_proj, dropout" in str(apply_adapters(stock, [unknown]))


def test_a_head_or_a_softcap_that_is_not_there(device):
    stock = build(PhiForCausalLM, PhiConfig(**TINY), device)
    unread = "its logits' scale and softcap cannot be read"
    for head, reason in [
        (CausalLM("PhiForCausalLM", softcap="cap"), f"{unread}: 'PhiConfig' object has no attribute 'cap'"),
        (CausalLM("PhiForCausalLM", logit_scale="config"), "its config is PhiConfig, not a number"),
        (CausalLM("PhiForCausalLM", logit_divisor="config.d"), f"{unread}: 'PhiConfig' object has no attribute 'd'"),
        (
            CausalLM("PhiForCausalLM", loss="ForMaskedLMLoss"),
            "its loss function is ForCausalLMLoss, not ForMaskedLMLoss",
        ),
    ]:
        assert [d.reason for d in apply_adapters(stock, [Adapter(modeling=PHI.modeling, head=head)]).declined] == [
            reason
        ]


def test_several_heads(device):
    heads = CausalLM("PhiForCausalLM"), CausalLM("PhiForSequenceClassification")
    adapter = Adapter(modeling=PHI.modeling, head=heads)
    assert adapter.heads == heads
    assert Adapter(modeling=PHI.modeling).heads == ()
    _, _, patch = pair(adapter, PhiForCausalLM, PhiConfig(**TINY), device)
    assert {s.cls for s in patch.swapped} == {"PhiForCausalLM", "Linear"}
