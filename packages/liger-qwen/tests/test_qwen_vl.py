"""The contracts for Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions of three axes, and a tower for images."""

from __future__ import annotations

from typing import ClassVar

import pytest
from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch
from liger_qwen import qwen2_5_vl, qwen2_vl, qwen3_vl, qwen3_vl_moe

TOKENS = {"image_token_id": 95, "video_token_id": 96, "vision_start_token_id": 97, "vision_end_token_id": 98}
PATCHES = {"in_channels": 3, "patch_size": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
TEXT = {
    **{key: value for key, value in TINY.items() if key != "attn_implementation"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    "rms_norm_eps": 1e-3,
}


class OfImages(AdapterContract):
    """Given text alone: transformers' vision towers do not compile as one graph."""

    config_class: ClassVar[type]
    vision: ClassVar[dict]
    text: ClassVar[dict] = TEXT

    def config(self):
        return self.config_class(
            text_config=self.text, vision_config={**PATCHES, **self.vision}, attn_implementation="eager", **TOKENS
        )

    def inputs(self, model):
        return batch(95, model.device)


class TestQwen2VL(OfImages):
    adapter = qwen2_vl
    config_class = Qwen2VLConfig
    text: ClassVar = {key: value for key, value in TEXT.items() if key != "head_dim"} | {
        "hidden_size": 64  # heads are hidden size / heads wide
    }
    vision: ClassVar = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}


class TestQwen25VL(OfImages):
    adapter = qwen2_5_vl
    config_class = Qwen2_5_VLConfig
    text: ClassVar = TestQwen2VL.text
    vision: ClassVar = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 8,
        "fullatt_block_indexes": [0],
    }


class TestQwen3VL(OfImages):
    adapter = qwen3_vl
    config_class = Qwen3VLConfig
    vision: ClassVar = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }


class TestQwen3VLMoe(OfImages):
    adapter = qwen3_vl_moe
    config_class = Qwen3VLMoeConfig
    vision: ClassVar = TestQwen3VL.vision
    text: ClassVar = {
        **TEXT,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }


@pytest.mark.parametrize("contract", [TestQwen2VL, TestQwen25VL, TestQwen3VL, TestQwen3VLMoe])
def test_a_word_about_the_cache_does_not_bring_whole_logits(device, contract):
    """Some of these models name no `use_cache`, and hand it on to their loss."""
    contract = contract()
    model = contract.model(device)
    contract.apply(model)
    logits = model(**contract.inputs(model), use_cache=False).logits
    assert "LazyLogits" in repr(logits)


@pytest.mark.parametrize("contract", [TestQwen2VL, TestQwen25VL, TestQwen3VL, TestQwen3VLMoe])
def test_an_image_of_four_tokens(device, path, contract, with_an_image):
    """The tower's attention and MLP keep their own code, and it gets its gradients."""
    contract = contract()
    stock, patched = contract.model(device), contract.model(device)
    patch = contract.apply(patched)
    assert {s.kind for s in patch.swapped if "visual" in s.name} <= {"norm"}
    assert_same_step(patched, stock, in_fp64(stock), with_an_image, together=True)
    assert patched.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
