"""The contracts for T5Gemma and T5Gemma 2, encoders with decoders, whose labels are compared with their own positions.

T5Gemma 2's decoder attends to itself and to the encoder at once, which sees images too.
"""

from __future__ import annotations

import pytest
import torch
from transformers import T5Gemma2Config, T5GemmaConfig
from transformers.models.t5gemma import modeling_t5gemma
from transformers.models.t5gemma2 import modeling_t5gemma2

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_t5gemma, apply_liger_kernel_to_t5gemma2, t5gemma, t5gemma2

PART = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}
PART_2 = {**PART, "attention_bias": True, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE = 98


def t5gemma_config(**options):
    return T5GemmaConfig(
        encoder={**PART, "hidden_size": 32, "final_logit_softcapping": 7.0},
        decoder={**PART, "cross_attention_hidden_size": 32},
        vocab_size=TINY["vocab_size"],
        attn_implementation="eager",
        **options,
    )


def t5gemma2_config(**options):
    return T5Gemma2Config(
        encoder={
            "text_config": {**PART_2, "final_logit_softcapping": 7.0},
            "vision_config": VISION,
            "mm_tokens_per_image": 4,
            "eoi_token_index": 97,
        },
        decoder=PART_2,
        image_token_index=IMAGE,
        attn_implementation="eager",
        **options,
    )


def inputs(device):
    """A target that is shorter than the source, and no token of an image."""
    source, target = batch(97, device), batch(97, device, length=7)
    return {
        "input_ids": source["input_ids"],
        "decoder_input_ids": target["input_ids"].roll(1, dims=-1),
        "labels": target["labels"],
    }


class TestT5Gemma(AdapterContract):
    adapter = t5gemma

    def config(self):
        return t5gemma_config()

    def inputs(self, model):
        return inputs(model.device)


class TestT5Gemma2(AdapterContract):
    adapter = t5gemma2

    def config(self):
        return t5gemma2_config()

    def inputs(self, model):
        return inputs(model.device)


def a_t5gemma(device, **options):
    return build(modeling_t5gemma.T5GemmaForConditionalGeneration, t5gemma_config(**options), device)


def a_t5gemma2(device, **options):
    return build(modeling_t5gemma2.T5Gemma2ForConditionalGeneration, t5gemma2_config(**options), device)


@pytest.mark.parametrize("model", [a_t5gemma, a_t5gemma2])
@pytest.mark.parametrize("tied", [True, False])
def test_decoder_inputs_made_from_labels(device, path, model, tied):
    stock, patched = (model(device, tie_word_embeddings=tied) for _ in range(2))
    assert not liger.apply(patched, loss="linear").declined
    given = {name: value for name, value in inputs(device).items() if name != "decoder_input_ids"}
    assert_same_step(patched, stock, in_fp64(stock), given)


@pytest.mark.parametrize(
    ("model", "apply"),
    [(a_t5gemma, apply_liger_kernel_to_t5gemma), (a_t5gemma2, apply_liger_kernel_to_t5gemma2)],
)
def test_dropout_is_where_it_was(device, path, model, apply):
    stock, patched = (model(device, dropout_rate=0.3) for _ in range(2))
    assert not apply(patched).declined
    losses = []
    for each in (stock, patched):
        torch.manual_seed(0)
        losses.append(each(**inputs(device)).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
        message = f"gradient of {name}: {{}}".format
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=message)


def test_a_loss_of_another_type_is_declined(device):
    stock = a_t5gemma(device)
    stock.loss_type = "ForCausalLM"
    (declined,) = {d.reason for d in liger.apply(stock).declined}
    assert declined == "its loss function is ForCausalLMLoss, not ForMaskedLMLoss"


@pytest.mark.parametrize(
    ("modeling", "name", "config"),
    [
        (modeling_t5gemma, "T5GemmaEncoderModel", t5gemma_config(is_encoder_decoder=False)),
        (modeling_t5gemma, "T5GemmaForSequenceClassification", t5gemma_config(is_encoder_decoder=False)),
        (modeling_t5gemma2, "T5Gemma2Encoder", t5gemma2_config().encoder),
        (modeling_t5gemma2, "T5Gemma2ForTokenClassification", t5gemma2_config()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_encoder_alone_and_a_classifier(device, path, modeling, name, config):
    stock, patched = (build(getattr(modeling, name), config, device) for _ in "ab")
    patch = liger.apply(patched)
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope"}
    assert not patch.declined
    ids = {"input_ids": inputs(device)["input_ids"]}
    torch.testing.assert_close(patched(**ids)[0], stock(**ids)[0], rtol=1e-4, atol=1e-4)


def test_an_image_of_four_tokens(device, path):
    """The tower keeps its own code and gets its gradients."""
    stock, patched = a_t5gemma2(device), a_t5gemma2(device)
    swapped = liger.apply(patched).swapped
    assert {s.name for s in swapped if ".layers." not in s.name} == {
        "",
        "lm_head.out_proj",
        "model.encoder.text_model.norm",
        "model.encoder.multi_modal_projector.mm_soft_emb_norm",
        "model.decoder.norm",
    }
    assert not any("vision_tower" in s.name for s in swapped)
    given = inputs(device)
    given["input_ids"][:, 2:6] = IMAGE
    given["pixel_values"] = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2)).to(device)
    assert_same_step(patched, stock, in_fp64(stock), given, together=True)
    tower = patched.model.encoder.vision_tower
    assert sum(parameter.grad.abs().sum() for parameter in tower.parameters() if parameter.grad is not None) > 0
