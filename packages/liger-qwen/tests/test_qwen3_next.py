"""The contract for Qwen3-Next: linear and full attention, dense and routed layers, a quarter of each head rotated."""

from __future__ import annotations

from transformers import Qwen3NextConfig
from transformers.models.qwen3_next import modeling_qwen3_next

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.tiny import build
from liger_qwen import qwen3_next

CONFIG = {
    **TINY,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [0],
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
    "rms_norm_eps": 1e-3,
}


class TestQwen3Next(AdapterContract):
    adapter = qwen3_next

    def config(self):
        return Qwen3NextConfig(**CONFIG)


def test_a_quarter_of_each_head_is_rotated(device):
    model = build(modeling_qwen3_next.Qwen3NextForCausalLM, Qwen3NextConfig(**CONFIG), device)
    assert model.model.rotary_emb.inv_freq.numel() * 2 == TINY["head_dim"] // 4
    assert [s.name for s in liger.apply(model).swapped if s.kind == "rope"] == ["model.layers.1.self_attn"]


def test_of_linear_attention_the_norm_alone_is_swapped(device):
    model = build(modeling_qwen3_next.Qwen3NextForCausalLM, Qwen3NextConfig(**CONFIG), device)
    swapped = {s.name: s.cls for s in liger.apply(model).swapped if ".linear_attn" in s.name}
    assert swapped == {"model.layers.0.linear_attn.norm": "Qwen3NextRMSNormGated"}
    assert type(model.model.layers[0].linear_attn) is modeling_qwen3_next.Qwen3NextGatedDeltaNet
