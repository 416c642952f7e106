"""The head of PaliGemma, whose language model is Gemma, which has no softcap, or Gemma 2, which has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liger.causal_lm import CausalLM
from liger.loss_request import AfterHead


@dataclass(frozen=True)
class PaliGemmaLM(CausalLM):
    """`CausalLM` whose softcap is the text config's `final_logit_softcapping`, if that has one."""

    def after_head(self, model: Any) -> AfterHead:
        """The softcap, if there is one."""
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        return AfterHead(scale=1.0, divisor=1.0, softcap=softcap)
