"""The contract for VaultGemma: Gemma 2 with two norms a layer."""

from __future__ import annotations

from transformers import VaultGemmaConfig
from transformers.models.vaultgemma import modeling_vaultgemma

from liger.testing import TINY, AdapterContract
from liger.testing.tiny import build
from liger_gemma import apply_liger_kernel_to_vaultgemma, vaultgemma

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}


class TestVaultGemma(AdapterContract):
    adapter = vaultgemma

    def config(self):
        return VaultGemmaConfig(**CONFIG)


def test_both_norms_of_a_layer_are_swapped(device):
    model = build(modeling_vaultgemma.VaultGemmaForCausalLM, VaultGemmaConfig(**CONFIG), device)
    names = {s.name for s in apply_liger_kernel_to_vaultgemma(model).swapped if s.kind == "norm"}
    roles = ("input", "pre_feedforward")
    assert names == {"model.norm"} | {f"model.layers.{i}.{role}_layernorm" for i in (0, 1) for role in roles}
