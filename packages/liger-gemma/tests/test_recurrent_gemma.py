"""The contract for RecurrentGemma: recurrent layers beside attention, half-rotated heads, biased MLPs."""

from __future__ import annotations

import torch
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma import modeling_recurrent_gemma

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_recurrent_gemma, recurrent_gemma

CONFIG = {
    **{name: value for name, value in TINY.items() if name != "head_dim"},
    "rms_norm_eps": 1e-3,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "attention", "recurrent"],
    "logits_soft_cap": 2.0,
    "attention_window_size": 4,
    "attention_bias": True,
}


def forget(block, *_):
    """The state of a forward is a part of its graph, which a model that is copied or runs again cannot keep."""
    block.rg_lru.recurrent_states = None


class TestRecurrentGemma(AdapterContract):
    adapter = recurrent_gemma

    def config(self):
        return RecurrentGemmaConfig(**CONFIG, use_cache=False)

    def model(self, device, dtype=torch.float32, cls=None):
        model = super().model(device, dtype, cls)
        for module in model.modules():
            if isinstance(module, modeling_recurrent_gemma.RecurrentGemmaRecurrentBlock):
                module.register_forward_hook(forget)
        return model


def model(device):
    return build(modeling_recurrent_gemma.RecurrentGemmaForCausalLM, RecurrentGemmaConfig(**CONFIG), device)


def test_heads_are_rotated_in_part(device):
    attention = model(device).model.layers[1].temporal_block
    assert attention.rotary_emb(torch.zeros(1), torch.zeros(1, 3))[0].shape[-1] == attention.head_dim // 2


def test_every_norm_is_swapped(device):
    names = {s.name for s in apply_liger_kernel_to_recurrent_gemma(model(device)).swapped if s.kind == "norm"}
    roles = ("temporal_pre_norm", "channel_pre_norm")
    assert names == {"model.final_norm"} | {f"model.layers.{i}.{role}" for i in range(3) for role in roles}


def test_generate_with_the_recurrent_states(device):
    stock = model(device).eval()
    prompt = batch(TINY["vocab_size"], device)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(prompt)}
    before = stock.generate(prompt, **options)
    liger.apply(stock)
    assert torch.equal(stock.generate(prompt, **options), before)
