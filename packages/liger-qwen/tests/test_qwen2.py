"""The contract for Qwen 2 and its mixture of experts, and what only their configs can say."""

from __future__ import annotations

import pytest
from transformers import Qwen2Config, Qwen2MoeConfig
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_qwen import qwen2, qwen2_moe

MOE = {
    **TINY,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [0],
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "rms_norm_eps": 1e-3,
}


class TestQwen2(AdapterContract):
    adapter = qwen2

    def config(self):
        return Qwen2Config(**TINY, rms_norm_eps=1e-3)


class TestQwen2Moe(AdapterContract):
    adapter = qwen2_moe

    def config(self):
        return Qwen2MoeConfig(**MOE)


QWEN2 = {
    "tied": {"tie_word_embeddings": True},
    "sliding": {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


@pytest.mark.parametrize("options", QWEN2.values(), ids=QWEN2)
def test_every_config_trains_as_stock(device, path, options):
    config = Qwen2Config(**{**TINY, **options})
    stock, patched = (build(modeling_qwen2.Qwen2ForCausalLM, config, device) for _ in range(2))
    assert not liger.apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


def test_the_attentions_biases_are_trained(device):
    model = build(modeling_qwen2.Qwen2ForCausalLM, Qwen2Config(**TINY), device)
    liger.apply(model)
    model(**batch(TINY["vocab_size"], device)).loss.backward()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.bias.grad.abs().sum() > 0
    assert attention.v_proj.bias.grad.abs().sum() > 0


def test_what_is_swapped_in_a_routed_layer_and_in_a_dense_one(device):
    model = build(modeling_qwen2_moe.Qwen2MoeForCausalLM, Qwen2MoeConfig(**MOE), device)
    patch = liger.apply(model)
    swapped = {s.name: (s.kind, s.cls) for s in patch.swapped if ".mlp" in s.name}
    assert swapped == {
        "model.layers.0.mlp": ("mlp", "Qwen2MoeMLP"),
        "model.layers.1.mlp.experts": ("experts", "Qwen2MoeExperts"),
        "model.layers.1.mlp.shared_expert": ("mlp", "Qwen2MoeMLP"),
    }
    assert type(model.model.layers[1].mlp.gate) is modeling_qwen2_moe.Qwen2MoeTopKRouter
