"""The contract for PaliGemma, whose language model is another adapter's: its loss, with and without a softcap."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import paligemma

VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES = {"image_size": 4, "patch_size": 2, "model_type": "siglip_vision_model", "projection_dim": 48}


def config(text):
    return PaliGemmaConfig(
        text_config=text.to_dict(),
        vision_config={**VISION, **IMAGES},
        projection_dim=48,
        image_token_index=98,
        attn_implementation="eager",
    )


def texts(model_inputs):
    return {**model_inputs, "token_type_ids": torch.ones_like(model_inputs["input_ids"])}


class TestPaliGemma2(AdapterContract):
    adapter = paligemma

    def config(self):
        return config(Gemma2Config(**TINY, final_logit_softcapping=2.0, sliding_window=4))

    def inputs(self, model):
        return texts(batch(98, model.device))


@pytest.mark.parametrize(
    "text", [GemmaConfig(**TINY), Gemma2Config(**TINY, final_logit_softcapping=2.0)], ids=["gemma", "gemma2"]
)
def test_an_image_of_four_tokens(device, path, text):
    cls = paligemma.module().PaliGemmaForConditionalGeneration
    stock, patched = (build(cls, config(text), device) for _ in range(2))
    patch = liger.apply(patched, loss="linear")
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"}
    inputs = texts(batch(98, device))
    inputs["input_ids"][:, :4] = 98
    inputs["token_type_ids"][:, :4] = 0
    inputs["pixel_values"] = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).to(device)
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)
