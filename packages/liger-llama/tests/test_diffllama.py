"""The contract for DiffLlama, whose attention ends in a norm of torch's own."""

from __future__ import annotations

from transformers import DiffLlamaConfig
from transformers.models.diffllama import modeling_diffllama

from liger.testing import TINY, AdapterContract
from liger.testing.tiny import batch, build
from liger_llama import apply_liger_kernel_to_diffllama, diffllama


class TestDiffLlama(AdapterContract):
    adapter = diffllama

    def config(self):
        return DiffLlamaConfig(**TINY, rms_norm_eps=1e-3)

    def inputs(self, model):
        """More tokens than usual: the two attentions' difference cancels, and few tokens leave the rest to luck."""
        return batch(TINY["vocab_size"], model.device, rows=6, length=24)


def test_the_norm_of_the_attentions_difference_is_swapped(device):
    model = build(modeling_diffllama.DiffLlamaForCausalLM, DiffLlamaConfig(**TINY), device)
    names = {s.name for s in apply_liger_kernel_to_diffllama(model).swapped if s.cls == "nn.RMSNorm"}
    assert names == {f"model.layers.{layer}.self_attn.groupnorm" for layer in (0, 1)}
