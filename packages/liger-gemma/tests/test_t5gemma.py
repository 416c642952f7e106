"""The contract for T5Gemma, an encoder and a decoder, whose labels are compared with their own positions."""

from __future__ import annotations

import pytest
import torch
from transformers import T5GemmaConfig
from transformers.models.t5gemma import modeling_t5gemma

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_gemma import apply_liger_kernel_to_t5gemma, t5gemma

PART = {
    **TINY,
    "rms_norm_eps": 1e-3,
    "final_logit_softcapping": 2.0,
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
}


def config(**options):
    return T5GemmaConfig(
        encoder={**PART, "hidden_size": 32, "final_logit_softcapping": 7.0},
        decoder={**PART, "cross_attention_hidden_size": 32},
        vocab_size=TINY["vocab_size"],
        attn_implementation="eager",
        **options,
    )


def inputs(device):
    """A target that is shorter than the source."""
    source, target = batch(TINY["vocab_size"], device), batch(TINY["vocab_size"], device, length=7)
    return {
        "input_ids": source["input_ids"],
        "decoder_input_ids": target["input_ids"].roll(1, dims=-1),
        "labels": target["labels"],
    }


class TestT5Gemma(AdapterContract):
    adapter = t5gemma

    def config(self):
        return config()

    def inputs(self, model):
        return inputs(model.device)


def model(device, **options):
    return build(modeling_t5gemma.T5GemmaForConditionalGeneration, config(**options), device)


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_inputs_made_from_labels(device, path, tied):
    stock, patched = (model(device, tie_word_embeddings=tied) for _ in range(2))
    assert not liger.apply(patched, loss="linear").declined
    given = {name: value for name, value in inputs(device).items() if name != "decoder_input_ids"}
    assert_same_step(patched, stock, in_fp64(stock), given)


def test_dropout_is_where_it_was(device, path):
    stock, patched = (model(device, dropout_rate=0.3) for _ in range(2))
    assert not apply_liger_kernel_to_t5gemma(patched).declined
    losses = []
    for each in (stock, patched):
        torch.manual_seed(0)
        losses.append(each(**inputs(device)).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0])
    for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=f"gradient of {name}: {{}}".format)


def test_a_loss_of_another_type_is_declined(device):
    stock = model(device)
    stock.loss_type = "ForCausalLM"
    (declined,) = {d.reason for d in liger.apply(stock).declined}
    assert declined == "its loss function is ForCausalLMLoss, not ForMaskedLMLoss"


def test_the_encoder_alone_and_the_classifier_of_it(device, path):
    for name in ("T5GemmaEncoderModel", "T5GemmaForSequenceClassification"):
        stock, patched = (
            build(getattr(modeling_t5gemma, name), config(is_encoder_decoder=False), device) for _ in "ab"
        )
        assert not liger.apply(patched).declined
        ids = {"input_ids": inputs(device)["input_ids"]}
        torch.testing.assert_close(patched(**ids)[0], stock(**ids)[0], rtol=1e-4, atol=1e-4)
