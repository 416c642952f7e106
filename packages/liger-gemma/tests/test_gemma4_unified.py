"""The contract for Gemma 4 Unified, of text and with images and sound, which have no towers but projections."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedTextConfig
from transformers.models.gemma4_unified import modeling_gemma4_unified

from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_gemma4_unified, gemma4_unified

CONFIG = {
    **TINY,
    "rms_norm_eps": 0.1,  # where a norm magnifies numbers that are near 0, no two bf16 models agree
    "final_logit_softcapping": 2.0,
    "sliding_window": 4,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": True,
    "attention_bias": True,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
}
TOKENS = {"image_token_id": 110, "video_token_id": 111, "audio_token_id": 112, "boi_token_id": 113, "eoi_token_id": 114}


class TestGemma4Unified(AdapterContract):
    adapter = gemma4_unified

    def config(self):
        return Gemma4UnifiedTextConfig(**CONFIG)

    def model(self, device, dtype=torch.float32, cls=None):
        """With scales of the layers' outputs that are not one, and attention that is not near a choice of one key."""
        model = super().model(device, dtype, cls)
        for module in model.modules():
            if hasattr(module, "layer_scalar"):
                module.layer_scalar.fill_(0.75)
            if hasattr(module, "q_norm"):
                module.q_norm.weight.data.mul_(0.25)
        return model


class TestGemma4UnifiedOfImagesAndSound(TestGemma4Unified):
    model_class = "Gemma4UnifiedForConditionalGeneration"

    def config(self):
        return Gemma4UnifiedConfig(
            text_config={**CONFIG, "vocab_size": 120},
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

    def inputs(self, model):
        inputs = batch(110, model.device)
        return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


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


@pytest.mark.parametrize(
    "options",
    [
        {"final_logit_softcapping": None},
        {"attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_bidirectional_attention": "all"},
    ],
    ids=["no softcap", "nothing shared, both directions"],
)
def test_other_configs(device, path, options):
    config = Gemma4UnifiedTextConfig(**{**CONFIG, **options})
    stock, patched = (build(modeling_gemma4_unified.Gemma4UnifiedForCausalLM, config, device) for _ in range(2))
    assert not apply_liger_kernel_to_gemma4_unified(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


def test_the_last_logits_alone(device):
    """The backbone may drop all positions but these before its last layers."""
    config = Gemma4UnifiedTextConfig(**CONFIG)
    model = build(modeling_gemma4_unified.Gemma4UnifiedForCausalLM, config, device).eval()
    inputs = {"input_ids": batch(config.vocab_size, device)["input_ids"], "logits_to_keep": 2}
    expected = model(**inputs).logits
    apply_liger_kernel_to_gemma4_unified(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
