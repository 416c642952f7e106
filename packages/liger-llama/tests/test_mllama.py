"""The contract for Mllama's text model, with the image's states that its cross-attention layers attend to."""

from __future__ import annotations

import torch
from transformers import MllamaConfig, MllamaTextConfig
from transformers.models.mllama import modeling_mllama

from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_llama import apply_liger_kernel_to_mllama, mllama

CONFIG = {name: value for name, value in TINY.items() if name != "head_dim"}


def config():
    return MllamaTextConfig(**CONFIG, cross_attention_layers=[1], rms_norm_eps=1e-3)


class TestMllama(AdapterContract):
    adapter = mllama

    def config(self):
        return config()

    def inputs(self, model):
        states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
        return {**super().inputs(model), "cross_attention_states": states.to(model.device, model.dtype)}


class TestMllamaOfImages(AdapterContract):
    """The tower keeps its own code; the text attends to its states."""

    adapter = mllama
    model_class = "MllamaForConditionalGeneration"

    def config(self):
        vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_global_layers": 1}
        return MllamaConfig(
            text_config=config().to_dict(),
            vision_config={
                **vision, "attention_heads": 2, "image_size": 8, "patch_size": 4, "max_num_tiles": 1,
                "intermediate_layers_indices": [0], "vision_output_dim": 64, "supported_aspect_ratios": [[1, 1]],
            },
            image_token_index=98,
            attn_implementation="eager",
        )  # fmt: skip

    def inputs(self, model):
        pixels = torch.randn(2, 1, 1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        return {
            **batch(90, model.device),
            "pixel_values": pixels.to(model.device, model.dtype),
            "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long, device=model.device),
            "aspect_ratio_mask": torch.ones(2, 1, 1, dtype=torch.long, device=model.device),
            "cross_attention_mask": torch.ones(2, 9, 1, 1, dtype=torch.long, device=model.device),
        }


def test_text_alone_skips_the_cross_attention(device, path):
    stock, patched = (build(modeling_mllama.MllamaForCausalLM, config(), device) for _ in range(2))
    apply_liger_kernel_to_mllama(patched)
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


def test_logits_are_fp32_whatever_the_models_dtype(device):
    model = build(modeling_mllama.MllamaForCausalLM, config(), device, torch.bfloat16)
    inputs = batch(TINY["vocab_size"], device)
    stock = model(**inputs)
    apply_liger_kernel_to_mllama(model)
    patched = model(**inputs)
    assert patched.logits.dtype == (patched.logits + 0).dtype == stock.logits.dtype == torch.float32
