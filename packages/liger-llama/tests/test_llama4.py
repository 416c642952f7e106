"""The contract for Llama 4's text model: dense and routed layers, with and without rope, q and k normed after rope."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from transformers import Llama4Config, Llama4TextConfig
from transformers.models.llama4 import modeling_llama4

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_llama import apply_liger_kernel_to_llama4, llama4

CONFIG = {
    **TINY,
    "intermediate_size_mlp": 72,
    "num_local_experts": 3,
    "interleave_moe_layer_step": 2,
    "no_rope_layers": [1, 0],
    "floor_scale": 4,  # so that the last positions of the test's rows are scaled
    "rms_norm_eps": 1e-3,
}


class TestLlama4(AdapterContract):
    adapter = llama4
    declines: ClassVar = {"rope": "^apply_rotary_emb rotates neighbours by complex factors"}

    def config(self):
        return Llama4TextConfig(**CONFIG)


def model(device, **options):
    return build(modeling_llama4.Llama4ForCausalLM, Llama4TextConfig(**CONFIG, **options), device)


def test_what_is_swapped_in_a_routed_layer(device):
    patch = apply_liger_kernel_to_llama4(model(device))
    routed = {s.name: s.cls for s in patch.swapped if s.name.startswith("model.layers.1.feed_forward")}
    assert routed == {
        "model.layers.1.feed_forward.experts": "Llama4TextExperts",
        "model.layers.1.feed_forward.shared_expert": "Llama4TextMLP",
    }


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("act_fn", torch.nn.GELU(), "its act_fn is a GELU, which has no kernel"),
        ("act_fn", torch.nn.functional.silu, "its act_fn is a function, which has no kernel"),
        (
            "bias",
            torch.nn.Parameter(torch.zeros(3)),
            "holds bias, down_proj, gate_up_proj, not down_proj, gate_up_proj",
        ),
    ],
)
def test_other_experts_are_declined(device, attribute, value, reason):
    changed = model(device)
    experts = changed.model.layers[1].feed_forward.experts
    if hasattr(experts, attribute):
        delattr(experts, attribute)  # a child's name takes no function
    setattr(experts, attribute, value)
    assert [d.reason for d in liger.apply(changed).declined if d.kind == "experts"] == [reason]


@pytest.mark.parametrize("hooked", [False, True])
def test_the_activation_of_experts_is_their_own_though_it_changes_later(device, hooked):
    stock, patched = model(device), model(device)
    patched.load_state_dict(stock.state_dict())
    liger.apply(patched)
    inputs = batch(TINY["vocab_size"], device)
    for changed in (stock, patched):
        experts = changed.model.layers[1].feed_forward.experts
        experts.act_fn = torch.nn.SiLU() if hooked else torch.nn.ReLU()
        if hooked:
            experts.act_fn.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(patched(**inputs).loss, stock(**inputs).loss, rtol=1e-4, atol=1e-4)


VISION = {
    "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
}  # fmt: skip


def test_the_model_that_takes_images_keeps_its_own_loss(device):
    config = Llama4Config(
        vision_config=VISION,
        text_config={name: value for name, value in CONFIG.items() if name != "attn_implementation"},
        image_token_index=95,
        attn_implementation="eager",
    )
    stock, patched = (build(modeling_llama4.Llama4ForConditionalGeneration, config, device) for _ in range(2))
    inputs = batch(90, device)
    inputs["input_ids"][:, 2] = 95
    inputs["pixel_values"] = torch.randn(2, 3, 28, 28, device=device)
    patch = apply_liger_kernel_to_llama4(patched)
    (declined,) = (declined for declined in patch.declined if declined.kind == "loss")
    assert declined.reason.startswith("no adapter names this class")
    try:
        stock(**inputs)
    except AttributeError as error:
        pytest.skip(f"transformers' own forward fails: {error}")
    assert_same_step(patched, stock, in_fp64(stock), inputs)
