"""The contracts for Gemma 4 and Gemma 4 Unified, of text and of images: shared keys and values, heads of two sizes.

Gemma 4 has experts beside its MLPs, and towers; Gemma 4 Unified takes sound too, and has projections for towers.
"""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4Config, Gemma4TextConfig, Gemma4UnifiedConfig, Gemma4UnifiedTextConfig
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import (
    apply_liger_kernel_to_gemma4,
    apply_liger_kernel_to_gemma4_unified,
    gemma4,
    gemma4_unified,
)

BOTH = {
    **TINY,
    "final_logit_softcapping": 2.0,
    "sliding_window": 4,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": True,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
}
CONFIG = {
    **BOTH,
    "rms_norm_eps": 1e-3,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
}


# Each token goes to every expert: where two compete, a rounding decides, and no two bf16 models agree. Nor do they
# where a norm magnifies numbers that are near 0, which a large epsilon keeps it from.
OF_EVERY_EXPERT = {**CONFIG, "top_k_experts": CONFIG["num_experts"], "rms_norm_eps": 0.1}
UNIFIED = {**BOTH, "rms_norm_eps": 0.1, "attention_bias": True}
TOKENS = {f"{name}_token_id": 110 + i for i, name in enumerate(("image", "video", "audio", "boi", "eoi"))}


class Contract(AdapterContract):
    def model(self, device, dtype=torch.float32, cls=None):
        """With scales of the layers' outputs that are not one, and attention that is not near a choice of one key."""
        model = super().model(device, dtype, cls)
        for module in model.modules():
            if hasattr(module, "layer_scalar"):
                module.layer_scalar.fill_(0.75)
            if hasattr(module, "q_norm"):
                module.q_norm.weight.data.mul_(0.25)
        return model


class OfImages(Contract):
    def inputs(self, model):
        inputs = batch(110, model.device)
        return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


class TestGemma4(Contract):
    adapter = gemma4

    def config(self):
        return Gemma4TextConfig(**OF_EVERY_EXPERT)


class TestGemma4OfImages(OfImages):
    adapter = gemma4
    model_class = "Gemma4ForConditionalGeneration"

    def config(self):
        vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 16}
        return Gemma4Config(
            text_config={**OF_EVERY_EXPERT, "vocab_size": 120, "vocab_size_per_layer_input": 120},
            vision_config={**vision, "num_attention_heads": 2, "num_key_value_heads": 2},
            audio_config=None,
            **TOKENS,
            attn_implementation="eager",
        )


class TestGemma4Unified(Contract):
    adapter = gemma4_unified

    def config(self):
        return Gemma4UnifiedTextConfig(**UNIFIED)


class TestGemma4UnifiedOfImagesAndSound(OfImages):
    adapter = gemma4_unified
    model_class = "Gemma4UnifiedForConditionalGeneration"

    def config(self):
        return Gemma4UnifiedConfig(
            text_config={**UNIFIED, "vocab_size": 120},
            vision_config={
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 8,
                "output_proj_dims": 32,
            },
            audio_config={"audio_embed_dim": 20},
            attn_implementation="eager",
            **TOKENS,
        )


def a_gemma4(device, **options):
    return build(modeling_gemma4.Gemma4ForCausalLM, Gemma4TextConfig(**{**CONFIG, **options}), device)


def a_gemma4_unified(device, **options):
    config = Gemma4UnifiedTextConfig(**{**UNIFIED, **options})
    return build(modeling_gemma4_unified.Gemma4UnifiedForCausalLM, config, device)


each_model = pytest.mark.parametrize(
    ("model", "apply"),
    [(a_gemma4, apply_liger_kernel_to_gemma4), (a_gemma4_unified, apply_liger_kernel_to_gemma4_unified)],
    ids=["gemma4", "gemma4_unified"],
)


def test_the_towers_keep_their_mlps(device):
    contract = TestGemma4OfImages()
    swapped = contract.apply(contract.model(device)).swapped
    assert {s.kind for s in swapped if "vision_tower" in s.name} == {"norm"}


def test_what_is_swapped_where(device):
    patched = build(modeling_gemma4.Gemma4ForCausalLM, Gemma4TextConfig(**CONFIG), device)
    swapped = apply_liger_kernel_to_gemma4(patched).swapped
    assert {s.name for s in swapped if s.kind == "experts"} == {f"model.layers.{i}.experts" for i in range(3)}
    assert {s.name for s in swapped if s.kind == "mlp"} == {f"model.layers.{i}.mlp" for i in range(3)}
    norms = {s.name for s in swapped if s.kind == "norm"}
    weightless = {name for name in norms if not dict(patched.get_submodule(name).named_parameters())}
    values = {f"model.layers.{i}.self_attn.v_norm" for i in (0, 1)}
    assert weightless == values | {f"model.layers.{i}.router.norm" for i in range(3)}


@each_model
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_moe_block": False, "final_logit_softcapping": None},
        {"hidden_size_per_layer_input": 0, "attention_k_eq_v": False, "num_kv_shared_layers": 0},
        {"attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_bidirectional_attention": "all"},
    ],
    ids=["as it is", "dense, no softcap", "nothing shared", "nothing shared, both directions"],
)
def test_other_configs(device, path, model, apply, options):
    stock, patched = (model(device, **options) for _ in range(2))
    assert not apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


@each_model
def test_the_last_logits_alone(device, model, apply):
    """The backbone may drop all positions but these before its last layers."""
    patched = model(device).eval()
    inputs = {"input_ids": batch(TINY["vocab_size"], device)["input_ids"], "logits_to_keep": 2}
    expected = patched(**inputs).logits
    apply(patched)
    torch.testing.assert_close(patched(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_image_of_three_tokens_and_two_tokens_of_sound(device, path):
    contract = TestGemma4UnifiedOfImagesAndSound()
    stock, patched = contract.model(device), contract.model(device)
    swapped = contract.apply(patched).swapped
    assert {s.name for s in swapped if "language_model" not in s.name} == {
        "",
        "lm_head",
        "model.embed_vision.multimodal_embedder.embedding_pre_projection_norm",
        "model.embed_audio.embedding_pre_projection_norm",
    }
    random = torch.Generator().manual_seed(2)
    inputs = contract.inputs(patched)
    image, sound = (torch.zeros_like(inputs["input_ids"], dtype=torch.bool) for _ in "ab")
    image[:, 1:4], sound[:, 5:7] = True, True
    places = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, -1]], device=device)  # the last is padding
    inputs |= {
        "input_ids": inputs["input_ids"].masked_fill(image, 110).masked_fill(sound, 112),
        "labels": inputs["labels"].masked_fill(image | sound, -100),
        "mm_token_type_ids": image.int(),
        "pixel_values": torch.randn(2, 4, 4 * 4 * 3, generator=random).to(device),
        "image_position_ids": places.expand(2, 4, 2),
        "input_features": torch.randn(2, 3, 20, generator=random).to(device),
        "input_features_mask": torch.tensor([[True, True, False]] * 2, device=device),
    }
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)
    assert patched.model.embed_vision.patch_dense.weight.grad.abs().sum() > 0
    assert patched.model.embed_audio.embedding_projection.weight.grad.abs().sum() > 0


def test_experts_that_are_dispatched_one_by_one_are_declined(device):
    config = Gemma4TextConfig(**CONFIG)
    model = build(modeling_gemma4.Gemma4ForCausalLM, config, device)
    model.set_experts_implementation("eager")
    assert {d.cls for d in liger.apply(model).declined} == {"Gemma4TextExperts"}
    with pytest.raises(ValueError, match="experts=True was asked for and can be applied nowhere"):
        liger.apply(build(modeling_gemma4.Gemma4ForCausalLM, model.config, device), experts=True)
