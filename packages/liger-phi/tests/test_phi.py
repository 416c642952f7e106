"""The contract for Phi: torch's LayerNorm, half-rotated heads, a head with a bias, and an MLP without a gate."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import PhiConfig
from transformers.models.phi import modeling_phi

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.tiny import batch, build
from liger_phi import apply_liger_kernel_to_phi, phi

CONFIG = {
    **{name: value for name, value in TINY.items() if name != "head_dim"},
    "layer_norm_eps": 1e-3,
    "qk_layernorm": True,
}
NO_GATE = "^has no gate"


class TestPhi(AdapterContract):
    adapter = phi
    declines: ClassVar = {"mlp": NO_GATE}

    def config(self):
        return PhiConfig(**CONFIG)


def model(device, **options):
    return build(modeling_phi.PhiForCausalLM, PhiConfig(**{**CONFIG, **options}), device)


def test_every_norm_is_swapped(device):
    names = {s.name for s in apply_liger_kernel_to_phi(model(device)).swapped if s.kind == "norm"}
    parts = ("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm")
    assert names == {"model.final_layernorm"} | {f"model.layers.{i}.{part}" for i in (0, 1) for part in parts}


def test_a_layer_norm_of_someone_elses_is_left_alone(device):
    """The model's own code says nothing of a module that was added to it."""
    changed = model(device)
    changed.lm_head = torch.nn.Sequential(torch.nn.LayerNorm(48), changed.lm_head).to(device)
    patch = liger.apply(changed)
    assert "lm_head.0" not in {s.name for s in patch.swapped}
    assert {d.reason for d in patch.declined if d.kind == "loss"} == {
        "lm_head is torch.nn.modules.container.Sequential, not torch.nn.Linear"
    }


def test_the_heads_bias_gets_its_gradient(device, path):
    stock, patched = model(device), model(device)
    apply_liger_kernel_to_phi(patched)
    for each in (stock, patched):
        each(**batch(CONFIG["vocab_size"], device)).loss.backward()
    torch.testing.assert_close(patched.lm_head.bias.grad, stock.lm_head.bias.grad)
    assert patched.lm_head.bias.grad.abs().sum() > 0


def test_dropouts_are_where_they_were(device, path):
    losses = []
    for patched in (False, True):
        each = model(device, resid_pdrop=0.3, embd_pdrop=0.2)
        if patched:
            apply_liger_kernel_to_phi(each)
        torch.manual_seed(0)
        losses.append(each(**batch(CONFIG["vocab_size"], device)).loss)
    torch.testing.assert_close(*losses)


def test_there_is_no_switch_for_an_mlp_without_a_gate(device):
    with pytest.raises(TypeError, match="expected of rope, layer_norm, cross_entropy, fused_linear_cross_entropy"):
        apply_liger_kernel_to_phi(model(device), swiglu=True)
    with pytest.raises(ValueError, match="mlp=True was asked for and can be applied nowhere: PhiMLP: has no gate"):
        liger.apply(model(device), mlp=True)
