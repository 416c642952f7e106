"""The head of PaliGemma, whose language model is Gemma, which has no softcap, or Gemma 2, which has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from liger.causal_lm import CausalLM, mentions_softcap
from liger.loss_request import AfterHead


@dataclass(frozen=True)
class PaliGemmaLM(CausalLM):
    """`CausalLM` whose softcap is the text config's, if that has one and this version of transformers applies it."""

    def softcap_declines(self, model: Any) -> None:
        """Never: `after_head` sees what the model applies."""

    def after_head(self, model: Any) -> AfterHead:
        """The softcap, if there is one."""
        caps = mentions_softcap(type(model))
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None) if caps else None
        return AfterHead(scale=1.0, divisor=1.0, softcap=softcap)
