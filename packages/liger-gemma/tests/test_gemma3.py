"""The contract for Gemma 3's text model; that the model with images does not get the text model's softcap."""

from __future__ import annotations

import torch
from transformers import Gemma3Config, Gemma3TextConfig
from transformers.models.gemma3 import modeling_gemma3

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_gemma3, gemma3

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


class TestGemma3(AdapterContract):
    adapter = gemma3

    def config(self):
        return Gemma3TextConfig(**CONFIG)


def test_q_and_k_are_normed_before_rope(device):
    model = build(modeling_gemma3.Gemma3ForCausalLM, Gemma3TextConfig(**CONFIG), device)
    names = {s.name for s in apply_liger_kernel_to_gemma3(model).swapped if s.kind == "norm"}
    assert {f"model.layers.{i}.self_attn.{x}_norm" for i in (0, 1) for x in "qk"} < names


def test_the_text_classifier(device, path):
    config = Gemma3TextConfig(**CONFIG)
    stock, patched = (build(modeling_gemma3.Gemma3TextForSequenceClassification, config, device) for _ in range(2))
    assert not liger.apply(patched).declined
    inputs = {**batch(config.vocab_size, device), "labels": torch.tensor([0, 1], device=device)}
    assert_same_step(patched, stock, in_fp64(stock), inputs)


def test_a_model_with_images_keeps_its_own_loss_which_has_no_softcap(device, path):
    config = Gemma3Config(
        text_config=CONFIG,
        vision_config=VISION,
        mm_tokens_per_image=4,
        attn_implementation="eager",
        image_token_index=98,
    )
    stock, patched = (build(modeling_gemma3.Gemma3ForConditionalGeneration, config, device) for _ in range(2))
    swapped = liger.apply(patched).swapped
    assert {s.kind for s in swapped} == {"norm", "mlp", "rope"}
    assert "model.multi_modal_projector.mm_soft_emb_norm" in {s.name for s in swapped}
    inputs = batch(90, device)
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    assert_same_step(patched, stock, in_fp64(stock), inputs)
