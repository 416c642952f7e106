"""Logits that the model multiplies or divides after its head: the fused loss and the lazy logits are of those."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import CohereConfig, GraniteConfig

from liger.adapter import Adapter
from liger.causal_lm import CausalLM
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build

GRANITE = "transformers.models.granite.modeling_granite"
COHERE = "transformers.models.cohere.modeling_cohere"
DIVIDED = CausalLM("GraniteForCausalLM", logit_divisor="config.logits_scaling")
MODELS = {
    "divided": (GRANITE, DIVIDED, GraniteConfig(**TINY, logits_scaling=6.0)),
    "multiplied": (COHERE, CausalLM("CohereForCausalLM", logit_scale="logit_scale"), CohereConfig(**TINY)),
}


@pytest.fixture(params=MODELS)
def models(request, device):
    """(stock, patched) of the same weights, for a function of a dtype."""
    modeling, head, config = MODELS[request.param]
    adapter = Adapter(modeling=modeling, head=head)

    def pair(dtype=torch.float32):
        stock = build(getattr(adapter.module(), head.model), config, device, dtype)
        patched = copy.deepcopy(stock)
        assert not apply_adapters(patched, [adapter], loss="linear").declined
        return stock, patched

    return pair


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_loss_and_gradients(models, device, path, dtype):
    stock, patched = models(dtype)
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


def test_lazy_logits_are_the_models(models, device):
    outputs = [model(**batch(TINY["vocab_size"], device)) for model in models(torch.bfloat16)]
    assert torch.equal(outputs[1].logits + 0, outputs[0].logits)


def test_the_scale_is_read_when_the_model_runs(device):
    modeling, head, config = MODELS["divided"]
    model = build(Adapter(modeling=modeling, head=head).module().GraniteForCausalLM, copy.deepcopy(config), device)
    inputs = batch(TINY["vocab_size"], device)
    with apply_adapters(model, [Adapter(modeling=modeling, head=head)], loss="linear"):
        model.config.logits_scaling = 2.0
        ours = model(**inputs).loss
    torch.testing.assert_close(ours, model(**inputs).loss)


def test_a_scale_that_is_not_named_is_a_wrong_loss_which_the_contract_sees(device):
    stock = build(Adapter(modeling=GRANITE).module().GraniteForCausalLM, MODELS["divided"][2], device)
    patched = copy.deepcopy(stock)
    apply_adapters(patched, [Adapter(modeling=GRANITE, head=CausalLM("GraniteForCausalLM"))], loss="linear")
    with pytest.raises(AssertionError, match="loss"):
        assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))
