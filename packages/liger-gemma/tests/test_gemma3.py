"""The contract for Gemma 3's text model and the model with images, which does not have the text model's softcap."""

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


class TestGemma3OfImages(AdapterContract):
    adapter = gemma3
    model_class = "Gemma3ForConditionalGeneration"

    def config(self):
        return Gemma3Config(
            text_config=CONFIG,
            vision_config=VISION,
            mm_tokens_per_image=4,
            attn_implementation="eager",
            image_token_index=98,
        )

    def inputs(self, model):
        inputs = batch(90, model.device)
        return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def test_an_image_of_four_tokens(device, path):
    """The tower keeps its own code and gets its gradients."""
    contract = TestGemma3OfImages()
    stock, patched = contract.model(device), contract.model(device)
    swapped = contract.apply(patched).swapped
    assert {s.name for s in swapped if "language_model" not in s.name} == {
        "", "lm_head", "model.multi_modal_projector.mm_soft_emb_norm"
    }  # fmt: skip
    inputs = contract.inputs(patched)
    inputs["token_type_ids"][:, 2:6] = 1
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["token_type_ids"] == 1, 98)
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2)).to(device)
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)
    assert patched.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


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
