from typing import ClassVar

import liger_frozen
from transformers import Olmo2Config, Starcoder2Config

from liger.testing import TINY, AdapterContract


class TestOlmo2(AdapterContract):
    adapter = liger_frozen.olmo2

    def config(self):
        return Olmo2Config(**TINY, rms_norm_eps=1e-3)


class TestStarcoder2(AdapterContract):
    adapter = liger_frozen.starcoder2
    declines: ClassVar = {"Starcoder2MLP": "^has no gate$", "rope": "^apply_rotary_pos_emb is left alone here$"}

    def config(self):
        return Starcoder2Config(**TINY, norm_epsilon=1e-3)
