"""The contract for PhiMoE: torch's LayerNorm, experts that are sampled while it trains, a head with a bias."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import PhimoeConfig
from transformers.models.phimoe import modeling_phimoe

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_phi import apply_liger_kernel_to_phimoe, phimoe

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "lm_head_bias": True,
    "router_aux_loss_coef": 0.1,
    "sliding_window": 4,
}


@pytest.fixture
def best_experts(monkeypatch):
    """Every token goes to its best experts in training too, or no two steps could be compared."""
    sampling = modeling_phimoe.sparsemixer

    @functools.wraps(sampling)
    def best(scores, jitter_eps, training, top_k=2):
        return sampling(scores, jitter_eps, False, top_k)

    monkeypatch.setattr(modeling_phimoe, "sparsemixer", best)


@pytest.mark.usefixtures("best_experts")
class TestPhimoe(AdapterContract):
    adapter = phimoe

    def config(self):
        return PhimoeConfig(**CONFIG)

    def inputs(self, model):
        """With the router's loss, but for `generate`: transformers 5.17 cannot do both."""
        return {**super().inputs(model), "output_router_logits": True}


def pair(device, **options):
    return [build(modeling_phimoe.PhimoeForCausalLM, PhimoeConfig(**{**CONFIG, **options}), device) for _ in range(2)]


def step(model, inputs):
    torch.manual_seed(0)
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs


def test_sampled_experts_and_jitter_in_place(device, path):
    """The router scales its input, the norm's output, in place while it trains."""
    stock, patched = pair(device, input_jitter_noise=0.2, output_router_logits=True)
    assert not apply_liger_kernel_to_phimoe(patched).declined
    ours, theirs = (step(model, batch(CONFIG["vocab_size"], device)) for model in (patched, stock))
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(patched.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4, msg=f"gradient of {name}: {{}}".format)


@pytest.mark.usefixtures("best_experts")
@pytest.mark.parametrize("length", [9, 20], ids=["short", "long"])
@pytest.mark.parametrize("bias", [True, False])
def test_longrope_with_its_scales(device, path, length, bias):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    rope |= {"short_mscale": 1.2, "long_mscale": 1.4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    stock, patched = pair(device, rope_parameters=rope, lm_head_bias=bias)
    assert not apply_liger_kernel_to_phimoe(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(CONFIG["vocab_size"], device, length=length))


def test_experts_that_are_dispatched_one_by_one_are_declined(device):
    (model, _) = pair(device)
    model.set_experts_implementation("eager")
    (declined,) = {d.reason for d in liger.apply(model).declined}
    assert declined.startswith("experts_implementation='eager' does not call _apply_gate")
