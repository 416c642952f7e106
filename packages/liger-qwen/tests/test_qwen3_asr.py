"""The contract for Qwen3-ASR: a head on Qwen 3, which hears."""

from __future__ import annotations

import torch
from transformers import Qwen3ASRConfig, Qwen3Config

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch
from liger_qwen import qwen3_asr

SOUND = 98


class TestQwen3ASR(AdapterContract):
    adapter = qwen3_asr

    def config(self):
        return Qwen3ASRConfig(
            text_config=Qwen3Config(**TINY, rms_norm_eps=1e-3),
            audio_config={
                "model_type": "qwen3_asr_encoder",
                "d_model": 32,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 40,
                "num_mel_bins": 8,
                "output_dim": 48,
                "downsample_hidden_size": 8,
            },
            audio_token_id=SOUND,
            pad_token_id=0,
            eos_token_id=2,
            attn_implementation="eager",
        )

    def inputs(self, model):
        return batch(SOUND, model.device)


def test_two_tokens_of_sound_and_qwen_3_below_the_head(device, path):
    contract = TestQwen3ASR()
    stock, patched = contract.model(device), contract.model(device)
    patch = liger.apply(patched)
    assert not patch.declined
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope", "loss"}
    assert not any("audio_tower" in s.name for s in patch.swapped)
    inputs = contract.inputs(patched)
    inputs["input_ids"][:, 2:4], inputs["labels"][:, 2:4] = SOUND, -100
    features = torch.randn(2, 8, 100, generator=torch.Generator().manual_seed(2))
    inputs["input_features"] = features.to(device)
    inputs["input_features_mask"] = (torch.arange(100, device=device) < 16).long().expand(2, 100)
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)
    assert patched.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
