"""The contracts for the thinkers of Qwen2.5-Omni and Qwen3-Omni, and the whole models, which speak too."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from transformers import Qwen2_5OmniConfig, Qwen3OmniMoeConfig
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni
from transformers.models.qwen3_omni_moe import modeling_qwen3_omni_moe

import liger
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_qwen import qwen2_5_omni, qwen3_omni_moe

AUDIO_START, VISION_START, AUDIO, IMAGE, VIDEO = 93, 94, 95, 96, 97
ROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
TEXT = {
    **{key: value for key, value in TINY.items() if key != "attn_implementation"},
    "rope_parameters": ROPE,
    "rms_norm_eps": 1e-3,
}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 2,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
HEARING = {
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "output_dim": 48,
}
TOKENS = {
    "audio_token_id": AUDIO,
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "audio_start_token_id": AUDIO_START,
}
THINKER_2_5 = {
    "text_config": {**{k: v for k, v in TEXT.items() if k != "head_dim"}, "hidden_size": 64},
    "vision_config": {**VISION, "out_hidden_size": 64, "window_size": 8, "fullatt_block_indexes": [0]},
    "audio_config": {**HEARING, "output_dim": 64},
    **TOKENS,
}
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
THINKER_3 = {
    "text_config": {
        **TEXT,
        **EXPERTS,
        "num_experts_per_tok": 5,  # where two experts compete, a rounding decides, and no two bf16 models agree
        "mlp_only_layers": [0],
        "attention_bias": True,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    },
    "vision_config": {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    "audio_config": {**HEARING, "downsample_hidden_size": 8},
    **TOKENS,
}
SPEECH = {key: value for key, value in TEXT.items() if key not in ("bos_token_id", "eos_token_id")} | {"vocab_size": 50}
WHOLE_2_5 = {
    "thinker_config": THINKER_2_5,
    "talker_config": {
        **SPEECH,
        **TOKENS,
        "embedding_size": 64,
        "tts_codec_start_token_id": 43,
        "tts_codec_end_token_id": 44,
        "tts_codec_pad_token_id": 42,
        "tts_codec_mask_token_id": 46,
    },
    "token2wav_config": {
        "dit_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "head_dim": 16,
            "emb_dim": 24,
            "block_size": 4,
            "look_ahead_layers": [1],
            "look_backward_layers": [0],
            "num_embeds": 49,
            "mel_dim": 8,
            "enc_emb_dim": 12,
            "enc_dim": 16,
            "enc_channels": [16, 16, 16, 16, 48],
            "enc_attention_channels": 8,
            "enc_se_channels": 8,
            "rope_parameters": ROPE,
        },
        "bigvgan_config": {"mel_dim": 8, "upsample_initial_channel": 64},
    },
}
WHOLE_3 = {
    "thinker_config": THINKER_3,
    "talker_config": {
        **TOKENS,
        "text_config": {**SPEECH, **EXPERTS, "shared_expert_intermediate_size": 40},
        "code_predictor_config": {**SPEECH, "rope_parameters": None, "num_code_groups": 4},
        "num_code_groups": 4,
        "thinker_hidden_size": 48,
        "spatial_merge_size": 2,
    },
    "code2wav_config": {
        "codebook_size": 50,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "num_quantizers": 4,
        "decoder_dim": 16,
        "sliding_window": 4,
    },
}


class OfThinker(AdapterContract):
    """Given text alone: transformers' towers do not compile as one graph."""

    thinker: ClassVar[dict]

    def config(self):
        cls = getattr(self.adapter.module(), self.language_model).config_class
        return cls(**self.thinker, attn_implementation="eager")

    def inputs(self, model):
        return batch(AUDIO_START, model.device)


class TestQwen25Omni(OfThinker):
    adapter = qwen2_5_omni
    thinker = THINKER_2_5


class TestQwen3Omni(OfThinker):
    adapter = qwen3_omni_moe
    thinker = THINKER_3


def seen_and_heard(device, frames) -> dict[str, Any]:
    """Two rows of text, each with an image of four tokens from sixteen patches, and two tokens of sound."""
    inputs, random = batch(AUDIO_START, device, length=14), torch.Generator().manual_seed(2)
    ids = inputs["input_ids"]
    ids[:, 1], ids[:, 2:6], ids[:, 8], ids[:, 9:11] = VISION_START, IMAGE, AUDIO_START, AUDIO
    return {
        "input_ids": ids,
        "labels": inputs["labels"].masked_fill(ids >= AUDIO_START, -100),
        "attention_mask": torch.ones_like(ids),  # positions of three axes are made where there is one
        "pixel_values": torch.randn(2 * 16, 3 * 2 * 2 * 2, generator=random).to(device),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2, device=device),
        "input_features": torch.randn(2, 8, frames, generator=random).to(device),
        "feature_attention_mask": torch.ones(2, frames, dtype=torch.long, device=device),
    }


@pytest.mark.parametrize(("contract", "frames"), [(TestQwen25Omni, 8), (TestQwen3Omni, 16)])
def test_an_image_of_four_tokens_and_two_tokens_of_sound(device, path, contract, frames):
    """The towers keep their attention and MLPs, and get their gradients."""
    contract = contract()
    stock, patched = contract.model(device), contract.model(device)
    patch = contract.apply(patched)
    towers = {s.kind for s in patch.swapped if "visual" in s.name or "audio_tower" in s.name}
    assert towers <= {"norm"}  # Qwen2.5-Omni's tower for images has the language model's norms
    inputs = seen_and_heard(device, frames)
    assert_same_step(patched, stock, in_fp64(stock), inputs, together=True)
    for name, tower in patched.named_modules():
        if name.endswith(("visual", "audio_tower")):
            assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters()), name


def whole(cls, config, device):
    stock, patched = (build(cls, config, device) for _ in range(2))
    patch = liger.apply(patched)
    return stock, patched, patch


def assert_same(ours, theirs):
    torch.testing.assert_close(ours + 0, theirs, rtol=1e-4, atol=1e-4)


def test_the_whole_qwen2_5_omni_thinks_and_speaks_as_before(device, path):
    config = Qwen2_5OmniConfig(**WHOLE_2_5, attn_implementation="eager")
    stock, patched, patch = whole(modeling_qwen2_5_omni.Qwen2_5OmniForConditionalGeneration, config, device)
    assert not patch.declined
    assert {s.kind for s in patch.swapped if s.name.startswith("talker")} == {"norm", "mlp", "rope"}
    assert {s.cls for s in patch.swapped if s.name.startswith("token2wav")} == {"DiTAttention"}
    assert_same_step(patched.thinker, stock.thinker, in_fp64(stock.thinker), seen_and_heard(device, 8), together=True)
    random = torch.Generator().manual_seed(3)
    thoughts, voice = torch.randn(2, 9, 64, generator=random), torch.randn(1, 12, generator=random)
    text, mel = batch(AUDIO_START, device)["input_ids"], torch.randn(1, 12, 8, generator=random)
    codes = torch.randint(0, 48, (1, 8), generator=random)
    said, mels = [], []
    for model in (patched.eval(), stock.eval()):
        mask = torch.ones_like(text)
        # The talker writes into the embeddings that it is given.
        given = {"inputs_embeds": thoughts.to(device, copy=True), "attention_mask": mask, "input_text_ids": text}
        said.append(model.talker(**given).logits)
        torch.manual_seed(0)
        of = (tensor.to(device) for tensor in (voice, mel, codes))
        mels.append(model.token2wav.code2wav_dit_model.sample(*of, num_steps=2))
    assert_same(*said)
    assert_same(*mels)


def test_the_whole_qwen3_omni_thinks_and_speaks_as_before(device, path):
    config = Qwen3OmniMoeConfig(**WHOLE_3, attn_implementation="eager")
    stock, patched, patch = whole(modeling_qwen3_omni_moe.Qwen3OmniMoeForConditionalGeneration, config, device)
    assert {(d.name, d.kind) for d in patch.declined} == {("talker.code_predictor", "loss")}
    assert {s.kind for s in patch.swapped if s.name.startswith("talker.model")} == {"norm", "rope"}
    for part in ("talker.code_predictor", "code2wav"):
        assert {s.kind for s in patch.swapped if s.name.startswith(part)} == {"rope"}
    assert_same_step(patched.thinker, stock.thinker, in_fp64(stock.thinker), seen_and_heard(device, 16), together=True)
    random = torch.Generator().manual_seed(3)
    thoughts = torch.randn(2, 9, 48, generator=random).to(device)
    codes = torch.randint(0, 50, (2, 4), generator=random).to(device)
    text = batch(AUDIO_START, device)["input_ids"]
    talked = {"inputs_embeds": thoughts, "attention_mask": torch.ones_like(text), "talker_input_ids": text}
    for speaks in (
        lambda model: model.talker(**talked).logits,
        lambda model: model.talker.code_predictor(inputs_embeds=thoughts[:, :4], labels=codes).loss,
        lambda model: model.code2wav.pre_transformer(inputs_embeds=thoughts).last_hidden_state,
    ):
        assert_same(speaks(patched.eval()), speaks(stock.eval()))
