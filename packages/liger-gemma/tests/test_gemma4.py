"""The contract for Gemma 4, of text and of images: experts beside MLPs, shared keys and values, heads of two sizes."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma4Config, Gemma4TextConfig
from transformers.models.gemma4 import modeling_gemma4

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_gemma4, gemma4

CONFIG = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "sliding_window": 4,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": True,
    "global_head_dim": 24,
    "num_global_key_value_heads": 1,
    "vocab_size_per_layer_input": 99,
    "hidden_size_per_layer_input": 8,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 40,
}


# Each token goes to every expert: where two compete, a rounding decides, and no two bf16 models agree. Nor do they
# where a norm magnifies numbers that are near 0, which a large epsilon keeps it from.
OF_EVERY_EXPERT = {**CONFIG, "top_k_experts": CONFIG["num_experts"], "rms_norm_eps": 0.1}


class TestGemma4(AdapterContract):
    adapter = gemma4

    def config(self):
        return Gemma4TextConfig(**OF_EVERY_EXPERT)

    def model(self, device, dtype=torch.float32, cls=None):
        """With scales of the layers' outputs that are not one, and attention that is not near a choice of one key."""
        model = super().model(device, dtype, cls)
        for module in model.modules():
            if hasattr(module, "layer_scalar"):
                module.layer_scalar.fill_(0.75)
            if hasattr(module, "q_norm"):
                module.q_norm.weight.data.mul_(0.25)
        return model


class TestGemma4OfImages(TestGemma4):
    model_class = "Gemma4ForConditionalGeneration"

    def config(self):
        vision = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "head_dim": 16}
        return Gemma4Config(
            text_config={**OF_EVERY_EXPERT, "vocab_size": 120, "vocab_size_per_layer_input": 120},
            vision_config={**vision, "num_attention_heads": 2, "num_key_value_heads": 2},
            audio_config=None,
            **{f"{name}_token_id": 110 + i for i, name in enumerate(("image", "video", "audio", "boi", "eoi"))},
            attn_implementation="eager",
        )

    def inputs(self, model):
        inputs = batch(110, model.device)
        return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["input_ids"])}


def test_the_towers_keep_their_mlps(device):
    contract = TestGemma4OfImages()
    swapped = contract.apply(contract.model(device)).swapped
    assert {s.kind for s in swapped if "vision_tower" in s.name} == {"norm"}


def test_what_is_swapped_where(device):
    patched = build(modeling_gemma4.Gemma4ForCausalLM, Gemma4TextConfig(**CONFIG), device)
    swapped = apply_liger_kernel_to_gemma4(patched).swapped
    assert {s.name for s in swapped if s.kind == "experts"} == {f"model.layers.{i}.experts" for i in range(3)}
    assert {s.name for s in swapped if s.kind == "mlp"} == {f"model.layers.{i}.mlp" for i in range(3)}
    norms = {s.name for s in swapped if s.kind == "norm"}
    weightless = {name for name in norms if not dict(patched.get_submodule(name).named_parameters())}
    values = {f"model.layers.{i}.self_attn.v_norm" for i in (0, 1)}
    assert weightless == values | {f"model.layers.{i}.router.norm" for i in range(3)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enable_moe_block": False, "final_logit_softcapping": None},
        {"hidden_size_per_layer_input": 0, "attention_k_eq_v": False, "num_kv_shared_layers": 0},
    ],
    ids=["routed", "dense, no softcap", "nothing shared"],
)
def test_other_configs(device, path, options):
    config = Gemma4TextConfig(**{**CONFIG, **options})
    stock, patched = (build(modeling_gemma4.Gemma4ForCausalLM, config, device) for _ in range(2))
    assert not apply_liger_kernel_to_gemma4(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


def test_the_last_logits_alone(device):
    """The backbone may drop all positions but these before its last layers."""
    config = Gemma4TextConfig(**CONFIG)
    model = build(modeling_gemma4.Gemma4ForCausalLM, config, device).eval()
    inputs = {"input_ids": batch(config.vocab_size, device)["input_ids"], "logits_to_keep": 2}
    expected = model(**inputs).logits
    liger.apply(model)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_are_dispatched_one_by_one_are_declined(device):
    config = Gemma4TextConfig(**CONFIG)
    model = build(modeling_gemma4.Gemma4ForCausalLM, config, device)
    model.set_experts_implementation("eager")
    assert {d.cls for d in liger.apply(model).declined} == {"Gemma4TextExperts"}
    with pytest.raises(ValueError, match="experts=True was asked for and can be applied nowhere"):
        liger.apply(build(modeling_gemma4.Gemma4ForCausalLM, model.config, device), experts=True)
