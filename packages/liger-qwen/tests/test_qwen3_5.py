"""The contract for the text models of Qwen 3.5: as Qwen3-Next, and positions of three axes."""

from __future__ import annotations

import torch
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_qwen import qwen3_5, qwen3_5_moe

CONFIG = {
    **TINY,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rms_norm_eps": 1e-3,
}
MOE = {
    **{name: value for name, value in CONFIG.items() if name != "intermediate_size"},
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}


class TestQwen35(AdapterContract):
    adapter = qwen3_5

    def config(self):
        return Qwen3_5TextConfig(**CONFIG, tie_word_embeddings=True)


class TestQwen35Moe(AdapterContract):
    adapter = qwen3_5_moe

    def config(self):
        return Qwen3_5MoeTextConfig(**MOE)


def test_positions_of_three_axes_reach_attention_as_cos_and_sin(device, path):
    cls = qwen3_5.module().Qwen3_5ForCausalLM
    stock, patched = (build(cls, Qwen3_5TextConfig(**CONFIG), device) for _ in range(2))
    liger.apply(patched)
    inputs = batch(CONFIG["vocab_size"], device)
    rows, length = inputs["input_ids"].shape
    axes = [torch.arange(length) * step for step in (1, 1, 3, 7)]  # text, time, height, width
    plain = stock(**inputs).loss
    inputs["position_ids"] = torch.stack(axes)[:, None].expand(4, rows, length).to(device)
    assert stock(**inputs).loss != plain
    assert_same_step(patched, stock, in_fp64(stock), inputs)
