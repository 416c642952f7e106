"""The contract for Phi-3: one projection for gate and up, partly rotated heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Phi3Config
from transformers.models.phi3 import modeling_phi3

from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_phi import apply_liger_kernel_to_phi3, phi3

CONFIG = {
    **{name: value for name, value in TINY.items() if name != "head_dim"},
    "rms_norm_eps": 1e-3,
    "sliding_window": 4,
    "original_max_position_embeddings": 16,
}


class TestPhi3(AdapterContract):
    adapter = phi3

    def config(self):
        return Phi3Config(**CONFIG, partial_rotary_factor=0.5)


def pair(device, **options):
    return [build(modeling_phi3.Phi3ForCausalLM, Phi3Config(**CONFIG, **options), device) for _ in range(2)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [9, 20], ids=["short", "long"])
def test_longrope_on_both_sides_of_its_switch(device, path, tied, length):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "factor": 4.0}
    rope |= {"short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 3.0, 5.0]}
    stock, patched = pair(device, rope_parameters=rope, tie_word_embeddings=tied)
    assert not apply_liger_kernel_to_phi3(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(CONFIG["vocab_size"], device, length=length))


def test_whole_heads_are_rotated_too(device, path):
    stock, patched = pair(device)
    apply_liger_kernel_to_phi3(patched, rope=True)
    assert_same_step(patched, stock, in_fp64(stock), batch(CONFIG["vocab_size"], device))


def test_dropouts_are_where_they_were(device, path):
    stock, patched = pair(device, resid_pdrop=0.3)
    apply_liger_kernel_to_phi3(patched)
    losses = []
    for each in (stock, patched):
        torch.manual_seed(0)
        losses.append(each(**batch(CONFIG["vocab_size"], device)).loss)
    torch.testing.assert_close(*losses)


def test_an_mlp_that_holds_something_else_is_declined(device):
    _, changed = pair(device)
    changed.model.layers[0].mlp.dropout = nn.Dropout(0.1)
    (declined,) = apply_liger_kernel_to_phi3(changed).declined
    assert declined.name == "model.layers.0.mlp"
    assert declined.reason == "holds activation_fn, down_proj, dropout, gate_up_proj, not down_proj, gate_up_proj"
