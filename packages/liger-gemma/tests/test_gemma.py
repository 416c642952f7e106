"""The contract for Gemma, and what holds for the norm of its whole family."""

from __future__ import annotations

import pytest
import torch
from transformers import GemmaConfig
from transformers.models.gemma import modeling_gemma

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_gemma, gemma


class TestGemma(AdapterContract):
    adapter = gemma

    def config(self):
        return GemmaConfig(**TINY, rms_norm_eps=1e-3, attention_bias=True)


class TestGemmaUntied(AdapterContract):
    adapter = gemma

    def config(self):
        return GemmaConfig(**TINY, rms_norm_eps=1e-3, tie_word_embeddings=False)


def test_weights_of_zero_are_a_scale_of_one(device, path):
    """As the norms are initialised: a kernel that forgot the 1 would return zeros."""
    torch.manual_seed(0)
    stock = modeling_gemma.GemmaForCausalLM(GemmaConfig(**TINY)).to(device)
    assert stock.model.norm.weight.eq(0).all()
    x = torch.randn(3, TINY["hidden_size"], device=device)
    expected = stock.model.norm(x)
    liger.apply(stock)
    torch.testing.assert_close(stock.model.norm(x), expected)
    assert stock.model.norm(x).abs().mean() > 0.5


class OfAbsolutes(modeling_gemma.GemmaRMSNorm):
    def _norm(self, x):
        return x / x.abs().mean(-1, keepdim=True)


@pytest.mark.parametrize("on", ["subclass", "instance"])
def test_a_norm_with_another_helper_is_declined(device, on):
    model = build(modeling_gemma.GemmaForCausalLM, GemmaConfig(**TINY), device)
    if on == "subclass":
        model.model.norm = OfAbsolutes(TINY["hidden_size"]).to(device)
    else:
        model.model.norm._norm = lambda x: 2 * x
    (declined,) = liger.apply(model).declined
    assert declined.name == "model.norm"
    assert ("OfAbsolutes overrides its _norm" if on == "subclass" else "its _norm was replaced on") in declined.reason


def test_the_legacy_gelu_means_what_transformers_makes_of_it(device, path):
    """The tanh GELU, or, before transformers made sure of it in the config, the other one."""
    config = GemmaConfig(**TINY, hidden_act="gelu")
    stock, patched = (build(modeling_gemma.GemmaForCausalLM, config, device) for _ in range(2))
    assert not liger.apply(patched, mlp=True).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


def test_gelu_new_is_not_the_tanh_gelu(device):
    """In fp32 they are equal, in bf16 they are not."""
    model = build(modeling_gemma.GemmaForCausalLM, GemmaConfig(**TINY, hidden_act="gelu_new"), device)
    assert "hidden_act='gelu_new' has no kernel" in str(liger.apply(model))


def test_norms_of_an_fp32_weight_keep_the_inputs_dtype(device, path):
    """LLaMA's norm would return fp32 here."""
    model = build(modeling_gemma.GemmaForCausalLM, GemmaConfig(**TINY), device)
    x = torch.randn(3, TINY["hidden_size"], device=device, dtype=torch.bfloat16)
    expected = model.model.norm(x)
    liger.apply(model)
    assert model.model.norm(x).dtype == expected.dtype == torch.bfloat16


def test_switches_of_apply_liger_kernel_to_gemma(device):
    model = build(modeling_gemma.GemmaForCausalLM, GemmaConfig(**TINY), device)
    with apply_liger_kernel_to_gemma(model) as patch:
        assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"}
    with apply_liger_kernel_to_gemma(model, geglu=False, rope=False) as patch:
        assert {s.kind for s in patch.swapped} == {"norm", "loss"}
    with pytest.raises(TypeError, match="expected of rope, rms_norm, geglu, cross_entropy"):
        apply_liger_kernel_to_gemma(model, swiglu=True)
