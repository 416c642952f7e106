"""The contract for Mixtral with its auxiliary loss, and its jitter, which changes a norm's output in place."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.tiny import batch, build
from liger_mistral import apply_liger_kernel_to_mixtral, mixtral

CONFIG = {**TINY, "rms_norm_eps": 1e-3, "num_local_experts": 4, "num_experts_per_tok": 2}


class TestMixtral(AdapterContract):
    adapter = mixtral

    def config(self):
        return MixtralConfig(**CONFIG, output_router_logits=True, router_aux_loss_coef=0.5)


def test_jitter_on_the_norms_output(device, path):
    """Mixtral multiplies what the norm returned in place: the norm must not have kept it for backward."""
    results = []
    for apply in (False, True):
        model = build(modeling_mixtral.MixtralForCausalLM, MixtralConfig(**CONFIG, router_jitter_noise=0.1), device)
        if apply:
            liger.apply(model)
        torch.manual_seed(0)
        loss = model(**batch(TINY["vocab_size"], device)).loss
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_the_switch_of_the_experts_is_called_swiglu(device):
    model = build(modeling_mixtral.MixtralForCausalLM, MixtralConfig(**CONFIG), device)
    with apply_liger_kernel_to_mixtral(model, swiglu=True) as patch:
        assert {s.cls for s in patch.swapped if s.kind == "experts"} == {"MixtralExperts"}
    with apply_liger_kernel_to_mixtral(model, swiglu=False) as patch:
        assert {s.kind for s in patch.swapped} == {"norm", "rope", "loss"}
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts=True was asked for .*='eager' does not call _apply_gate"):
        apply_liger_kernel_to_mixtral(model, swiglu=True)
