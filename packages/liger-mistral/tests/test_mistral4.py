"""The contract for Mistral 4: a dense layer and a routed one, compressed attention, pairs rotated side by side."""

from __future__ import annotations

import pytest
import torch
from transformers import Mistral4Config
from transformers.models.mistral4 import modeling_mistral4

import liger
from liger.testing import TINY, AdapterContract, assert_as_exact_as
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_mistral import mistral4
from liger_mistral.rotary_pairs import rotary_pairs

CONFIG = {
    **{name: value for name, value in TINY.items() if name != "head_dim"},
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-3,
    "moe_intermediate_size": 40,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
}
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def config(**options):
    return Mistral4Config(**CONFIG, rope_parameters=dict(ROPE), **options)


class TestMistral4(AdapterContract):
    adapter = mistral4

    def config(self):
        return config()


class TestMistral4WithHalves(AdapterContract):
    """The other of its two rotary functions."""

    adapter = mistral4

    def config(self):
        return config(rope_interleave=False)


def test_queries_that_are_not_compressed(device, path):
    settings = Mistral4Config(**{**CONFIG, "q_lora_rank": None}, rope_parameters=dict(ROPE))
    stock, patched = (build(modeling_mistral4.Mistral4ForCausalLM, settings, device) for _ in range(2))
    assert not liger.apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pairs_are_rotated_as_the_model_does(device, path, dtype):
    q, k = (torch.randn(2, heads, 5, 8, device=device, dtype=dtype, requires_grad=True) for heads in (3, 1))
    angle = torch.randn(1, 5, 4, device=device).repeat(1, 1, 2)
    upstream = [torch.randn_like(x) for x in (q, k)]
    results = []
    for function, to in (
        (rotary_pairs, dtype),
        (modeling_mistral4.apply_rotary_pos_emb_interleave, dtype),
        (modeling_mistral4.apply_rotary_pos_emb_interleave, torch.float64),
    ):
        inputs = [x.detach().to(to).requires_grad_() for x in (q, k)]
        cos, sin = (f(angle).to(dtype).to(to) for f in (torch.cos, torch.sin))
        outputs = function(*inputs, cos, sin)
        grads = torch.autograd.grad(outputs, inputs, [u.to(to) for u in upstream])
        results.append([*outputs, *grads])
    for name, *values in zip(("q_out", "k_out", "dq", "dk"), *results, strict=True):
        assert_as_exact_as(*values, name)
