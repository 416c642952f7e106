"""The contract for Gemma 2: four norms a layer, a window, and softcaps on attention and logits."""

from __future__ import annotations

import pytest
from transformers import Gemma2Config
from transformers.models.gemma2 import modeling_gemma2

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_gemma2, gemma2

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}


class TestGemma2(AdapterContract):
    adapter = gemma2

    def config(self):
        return Gemma2Config(**CONFIG)


@pytest.mark.parametrize("cap", [None, 0.5, 30.0])
def test_any_softcap_and_none(device, path, cap):
    config = Gemma2Config(**{**CONFIG, "final_logit_softcapping": cap})
    stock, patched = (build(modeling_gemma2.Gemma2ForCausalLM, config, device) for _ in range(2))
    patch = liger.apply(patched, loss="linear")
    assert not patch.declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


@pytest.mark.parametrize("cap", [-2.0, 0.0, float("inf")])
def test_a_softcap_that_is_none_is_declined(device, cap):
    config = Gemma2Config(**{**CONFIG, "final_logit_softcapping": cap})
    patch = liger.apply(build(modeling_gemma2.Gemma2ForCausalLM, config, device))
    reasons = {d.kind: d.reason for d in patch.declined}
    assert reasons == {"loss": f"its final_logit_softcapping is {cap}, not a positive number"}


def test_every_norm_of_the_sandwich_is_swapped(device):
    model = build(modeling_gemma2.Gemma2ForCausalLM, Gemma2Config(**CONFIG), device)
    names = {s.name for s in apply_liger_kernel_to_gemma2(model).swapped if s.kind == "norm"}
    roles = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    assert names == {"model.norm"} | {f"model.layers.{i}.{role}_layernorm" for i in (0, 1) for role in roles}
