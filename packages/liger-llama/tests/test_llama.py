"""The contract for LLaMA, and what only a LlamaConfig can say."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama import modeling_llama

import liger
from liger.testing import TINY, AdapterContract, assert_as_exact_as
from liger.testing.tiny import batch, build
from liger_llama import apply_liger_kernel_to_llama, llama


class TestLlama(AdapterContract):
    adapter = llama

    def config(self):
        return LlamaConfig(**TINY, rms_norm_eps=1e-3)


ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "linear": {"rope_parameters": {"rope_type": "linear", **ROPE}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", **ROPE}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", **ROPE}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}},
    "longrope": {
        "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **ROPE}
    },
    "biases": {"mlp_bias": True, "attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "head_dim-80": {"head_dim": 80},
    "head_dim-96": {"head_dim": 96},
    "head_dim-128": {"head_dim": 128},
    "sdpa": {"attn_implementation": "sdpa"},
    "attention-dropout-off": {"attention_dropout": 0.0, "pretraining_tp": 2},
}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_every_config_trains_as_stock(device, path, options):
    config = LlamaConfig(**{**TINY, **options})
    stock = build(modeling_llama.LlamaForCausalLM, config, device)
    patched, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    assert not liger.apply(patched).declined
    inputs = batch(config.vocab_size, device)
    results = []
    for model in (patched, stock, exact):
        loss = model(**inputs).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for name, *values in zip(["loss", *dict(stock.named_parameters())], *results, strict=True):
        assert_as_exact_as(*values, name, depth=40)


@pytest.mark.parametrize("act", ["relu", "gelu_new", "quick_gelu"])
def test_an_activation_without_a_kernel_is_declined_with_its_name(device, act):
    model = build(modeling_llama.LlamaForCausalLM, LlamaConfig(**TINY, hidden_act=act), device)
    patch = liger.apply(model)
    assert {(d.kind, d.cls) for d in patch.declined} == {("mlp", "LlamaMLP")}
    assert f"hidden_act='{act}' has no kernel" in str(patch)


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh"])
def test_gelu_gates_run_geglu(device, path, act):
    config = LlamaConfig(**TINY, hidden_act=act)
    stock = build(modeling_llama.LlamaForCausalLM, config, device)
    patched = copy.deepcopy(stock)
    assert not liger.apply(patched, mlp=True).declined
    inputs = batch(config.vocab_size, device)
    torch.testing.assert_close(patched(**inputs).loss, stock(**inputs).loss, rtol=1e-5, atol=1e-5)


def test_switches_of_apply_liger_kernel_to_llama(device):
    model = build(modeling_llama.LlamaForCausalLM, LlamaConfig(**TINY), device)
    with apply_liger_kernel_to_llama(model) as patch:
        assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"}
        assert any(s.runs == "linear_cross_entropy" for s in patch.swapped)
    with apply_liger_kernel_to_llama(model, rope=False, rms_norm=False, swiglu=False, cross_entropy=True) as patch:
        assert [(s.cls, s.runs) for s in patch.swapped] == [("LlamaForCausalLM", "cross_entropy of the logits")]
    with apply_liger_kernel_to_llama(model, fused_linear_cross_entropy=False) as patch:
        assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope"}
    with pytest.raises(ValueError, match="cannot both be True"):
        apply_liger_kernel_to_llama(model, cross_entropy=True, fused_linear_cross_entropy=True)
    with pytest.raises(
        TypeError,
        match="unexpected switch geglu, expected of rope, rms_norm, swiglu, cross_entropy",
    ):
        apply_liger_kernel_to_llama(model, geglu=True)


def test_models_built_after_apply_liger_kernel_to_llama_are_patched_until_undone(device):
    before = {name: getattr(modeling_llama, name).__init__ for name in modeling_llama.__all__}
    patch = apply_liger_kernel_to_llama()
    try:
        causal, bare, classifier = (
            build(cls, LlamaConfig(**TINY), device)
            for cls in (
                modeling_llama.LlamaForCausalLM,
                modeling_llama.LlamaModel,
                modeling_llama.LlamaForSequenceClassification,
            )
        )
    finally:
        patch.undo()
    assert {name: getattr(modeling_llama, name).__init__ for name in modeling_llama.__all__} == before
    stock = build(modeling_llama.LlamaForCausalLM, LlamaConfig(**TINY), device)
    assert type(stock) is modeling_llama.LlamaForCausalLM
    for model in (causal, bare, classifier):
        assert len(liger.apply(model).swapped) == 0
    inputs = batch(TINY["vocab_size"], device)
    torch.testing.assert_close(causal(**inputs).loss, stock(**inputs).loss)


def test_a_model_on_the_meta_device_is_patched_before_its_weights_load(device):
    stock = build(modeling_llama.LlamaForCausalLM, LlamaConfig(**TINY), device)
    with torch.device("meta"):
        model = modeling_llama.LlamaForCausalLM(LlamaConfig(**TINY))
    assert not liger.apply(model).declined
    model.to_empty(device=device).load_state_dict(stock.state_dict())
    for name, buffer in stock.named_buffers():  # rotary frequencies are not in the state dict
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    inputs = batch(TINY["vocab_size"], device)
    torch.testing.assert_close(model(**inputs).loss, stock(**inputs).loss)
