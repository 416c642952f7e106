"""The contract for Mistral, Ministral and Ministral 3, and what is particular to each."""

from __future__ import annotations

import pytest
from transformers import Ministral3Config, MinistralConfig, MistralConfig
from transformers.models.ministral3 import modeling_ministral3
from transformers.models.mistral import modeling_mistral

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_mistral import ministral, ministral3, mistral

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
