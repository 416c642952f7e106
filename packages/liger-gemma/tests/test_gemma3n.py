"""The contract for Gemma 3n's text model: sparse gates, shared keys, several streams, norms without weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3nTextConfig
from transformers.models.gemma3n import modeling_gemma3n

from liger.testing import TINY, AdapterContract
from liger.testing.tiny import build
from liger_gemma import apply_liger_kernel_to_gemma3n, gemma3n

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "sliding_window": 4,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [80, 72, 80, 72],
    "activation_sparsity_pattern": [0.6, 0.0, 0.8, 0.0],
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "altup_num_inputs": 3,
}


class TestGemma3n(AdapterContract):
    adapter = gemma3n

    def config(self):
        return Gemma3nTextConfig(**CONFIG)


def model(device):
    return build(modeling_gemma3n.Gemma3nForCausalLM, Gemma3nTextConfig(**CONFIG), device)


def test_norms_without_weight_are_swapped_too(device):
    patched = model(device)
    names = {s.name for s in apply_liger_kernel_to_gemma3n(patched).swapped if s.kind == "norm"}
    weightless = {name for name in names if not dict(patched.get_submodule(name).named_parameters())}
    assert weightless == {f"model.layers.{layer}.self_attn.v_norm" for layer in (0, 1)}


def test_dense_and_sparse_mlps_are_swapped(device):
    names = {s.name for s in apply_liger_kernel_to_gemma3n(model(device)).swapped if s.kind == "mlp"}
    assert names == {f"model.layers.{layer}.mlp" for layer in range(4)}


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("activation_sparsity", None, "has no number activation_sparsity"),
        ("_gaussian_topk", torch.relu, "its _gaussian_topk was replaced on the instance by"),
        ("dropout", nn.Dropout(0.1), "holds act_fn, down_proj, dropout, gate_proj, up_proj, not"),
    ],
)
def test_another_mlp_is_declined(device, attribute, value, reason):
    patched = model(device)
    setattr(patched.model.layers[0].mlp, attribute, value)
    (declined,) = apply_liger_kernel_to_gemma3n(patched).declined
    assert declined.name == "model.layers.0.mlp"
    assert declined.reason.startswith(reason)


def test_an_mlp_without_the_method_is_declined(device):
    mlp = model(device).model.layers[0].mlp
    mlp._gaussian_topk = None
    assert gemma3n.modules["Gemma3nTextMLP"].declines(mlp) == "has no method _gaussian_topk"
