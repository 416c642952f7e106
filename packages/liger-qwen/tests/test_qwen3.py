"""The contract for Qwen 3 and its mixture of experts, and what only their configs can say."""

from __future__ import annotations

from transformers import Qwen3Config, Qwen3MoeConfig
from transformers.models.qwen3 import modeling_qwen3

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_qwen import qwen3, qwen3_moe


class TestQwen3(AdapterContract):
    adapter = qwen3

    def config(self):
        return Qwen3Config(**TINY, tie_word_embeddings=True, rms_norm_eps=1e-3)


class TestQwen3Moe(AdapterContract):
    adapter = qwen3_moe

    def config(self):
        return Qwen3MoeConfig(
            **TINY,
            num_experts=5,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            mlp_only_layers=[0],
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
            rms_norm_eps=1e-3,
        )


def test_q_and_k_are_normed_head_by_head(device):
    model = build(modeling_qwen3.Qwen3ForCausalLM, Qwen3Config(**TINY), device)
    patch = liger.apply(model)
    heads = {s.name: model.get_submodule(s.name).weight.numel() for s in patch.swapped if s.name.endswith("k_norm")}
    assert heads == {f"model.layers.{i}.self_attn.k_norm": TINY["head_dim"] for i in range(2)}


def test_biases_and_a_sliding_window(device, path):
    config = Qwen3Config(**TINY, attention_bias=True, use_sliding_window=True, sliding_window=3, max_window_layers=1)
    stock, patched = (build(modeling_qwen3.Qwen3ForCausalLM, config, device) for _ in range(2))
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert not liger.apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))
