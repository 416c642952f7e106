"""The contract for the text models of Qwen 3.5: as Qwen3-Next, and positions of three axes."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5Config, Qwen3_5MoeConfig, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

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
VISION = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "in_channels": 3,
        "patch_size": 2,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 16,
    },
    "image_token_id": 95,
    "video_token_id": 96,
    "vision_start_token_id": 97,
    "vision_end_token_id": 98,
    "attn_implementation": "eager",
}


def with_vision(cls, text):
    return cls(text_config={key: value for key, value in text.items() if key != "attn_implementation"}, **VISION)


class TestQwen35(AdapterContract):
    adapter = qwen3_5

    def config(self):
        return Qwen3_5TextConfig(**CONFIG, tie_word_embeddings=True)


class TestQwen35Moe(AdapterContract):
    adapter = qwen3_5_moe

    def config(self):
        return Qwen3_5MoeTextConfig(**MOE)


class TestQwen35OfImages(AdapterContract):
    """Given text alone: transformers' vision tower does not compile as one graph."""

    adapter = qwen3_5
    model_class = "Qwen3_5ForConditionalGeneration"

    def config(self):
        return with_vision(Qwen3_5Config, {**CONFIG, "tie_word_embeddings": False})


class TestQwen35MoeOfImages(AdapterContract):
    adapter = qwen3_5_moe
    model_class = "Qwen3_5MoeForConditionalGeneration"

    def config(self):
        return with_vision(Qwen3_5MoeConfig, MOE)


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


@pytest.mark.parametrize("contract", [TestQwen35OfImages, TestQwen35MoeOfImages])
def test_an_image_of_four_tokens(device, path, contract, with_an_image):
    """The tower keeps its own code and gets its gradients."""
    contract = contract()
    stock, patched = contract.model(device), contract.model(device)
    patch = contract.apply(patched)
    assert not any("visual" in s.name for s in patch.swapped)
    # Torch multiplies the patches in tf32 on a GPU, and a linear attention's small gradients are a matter of luck.
    assert_same_step(patched, stock, in_fp64(stock), with_an_image, together=True)
    assert patched.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
