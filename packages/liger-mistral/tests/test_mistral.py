"""The contract for Mistral, Ministral and Ministral 3, and what is particular to each."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import Ministral3Config, MinistralConfig, Mistral3Config, MistralConfig
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.mistral import modeling_mistral

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_mistral import ministral, ministral3, mistral, mistral3

SCALED = {  # scales q from its fifth position on
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
}


class TestMistral(AdapterContract):
    adapter = mistral

    def config(self):
        return MistralConfig(**TINY, rms_norm_eps=1e-3, sliding_window=4)


class TestMinistral(AdapterContract):
    adapter = ministral

    def config(self):
        layers = ["sliding_attention", "full_attention"]
        return MinistralConfig(**TINY, rms_norm_eps=1e-3, sliding_window=4, layer_types=layers)


class TestMinistral3(AdapterContract):
    adapter = ministral3

    def config(self):
        return Ministral3Config(**TINY, rms_norm_eps=1e-3, rope_parameters=dict(SCALED))


class TestMistral3(AdapterContract):
    """Given text alone: it has one of the above as its language model, and a loss."""

    adapter = mistral3
    declines: ClassVar = {"norm": "^is the projector's, and sees nothing but images"}

    def config(self):
        vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
        return Mistral3Config(
            text_config=MistralConfig(**TINY).to_dict(),
            vision_config={**vision, "model_type": "pixtral", "image_size": 8, "patch_size": 2, "head_dim": 16},
            image_token_index=98,
            attn_implementation="eager",
        )

    def inputs(self, model):
        return batch(98, model.device)


def test_mistral_3_sees_an_image(device, path):
    contract = TestMistral3()
    stock, patched = contract.model(device), contract.model(device)
    assert {"norm", "mlp", "rope", "loss"} == {s.kind for s in liger.apply(patched).swapped}
    inputs = batch(98, device)
    inputs["input_ids"][:, 2:6] = 98
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    inputs |= {"pixel_values": pixels.to(device), "image_sizes": torch.tensor([[8, 8]] * 2)}
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)


@pytest.mark.parametrize(
    "options", [{"sliding_window": None}, {"tie_word_embeddings": True}, {"attn_implementation": "sdpa"}], ids=str
)
def test_every_config_trains_as_stock(device, path, options):
    config = MistralConfig(**{**TINY, **options})
    stock, patched = (build(modeling_mistral.MistralForCausalLM, config, device) for _ in range(2))
    assert not liger.apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


def test_ministral_3_scales_q_after_it_was_rotated(device, path):
    """The scale is a factor of q alone that grows with the position: what the kernel returns is what is scaled."""
    without = {**SCALED, "llama_4_scaling_beta": 0.0}
    losses = []
    for parameters in (SCALED, without):
        model = build(
            modeling_ministral3.Ministral3ForCausalLM,
            Ministral3Config(**TINY, rope_parameters=dict(parameters)),
            device,
        )
        liger.apply(model, rope=True)
        losses.append(model(**batch(TINY["vocab_size"], device)).loss)
    assert losses[0] != losses[1]
