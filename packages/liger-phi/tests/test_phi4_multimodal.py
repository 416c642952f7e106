"""The contract for Phi-4-multimodal, given text: its towers for images and sound keep their own code."""

from __future__ import annotations

from typing import ClassVar

from transformers import Phi4MultimodalConfig

from liger.testing import TINY, AdapterContract
from liger.testing.tiny import batch
from liger_phi import phi4_multimodal

VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
AUDIO = {"hidden_size": 16, "intermediate_size": 24, "num_blocks": 1, "num_attention_heads": 2, "input_size": 16}


class TestPhi4Multimodal(AdapterContract):
    adapter = phi4_multimodal
    declines: ClassVar = {
        "mlp": "^is the tower's for sound, and gates by its second half",
        "norm": "^(shifts and scales by two constants|is a tower's)",
    }

    def config(self):
        return Phi4MultimodalConfig(
            **{name: value for name, value in TINY.items() if name != "head_dim"},
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
            rms_norm_eps=1e-3,
            original_max_position_embeddings=64,
            vision_config={**VISION, "image_size": 28, "crop_size": 28, "image_token_id": 97},
            audio_config={
                **AUDIO, "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 16,
                "audio_token_id": 98,
            },
        )  # fmt: skip

    def inputs(self, model):
        return batch(97, model.device)
