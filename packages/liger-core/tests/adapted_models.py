"""Adapters for the tests of the core, which comes without any, and tiny models that they fit."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from liger.adapter import Adapter
from liger.causal_lm import CausalLM
from liger.layers import Experts, GatedMLP, RMSNorm
from liger.ops import rotary
from liger.testing import TINY
from liger.testing.tiny import build

LLAMA = Adapter(
    modeling="transformers.models.llama.modeling_llama",
    modules={"LlamaRMSNorm": RMSNorm(eps="variance_epsilon"), "LlamaMLP": GatedMLP(act="hidden_act")},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("LlamaForCausalLM"),
)
LLAMA_HEAD = Adapter(modeling=LLAMA.modeling, head=LLAMA.head)
MIXTRAL = Adapter(
    modeling="transformers.models.mixtral.modeling_mixtral",
    modules={"MixtralRMSNorm": RMSNorm(eps="variance_epsilon"), "MixtralExperts": Experts(act="hidden_act")},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("MixtralForCausalLM"),
)


def llama(device, dtype=torch.float32, **options):
    return build(LlamaForCausalLM, LlamaConfig(**TINY, **options), device, dtype)


def mixtral_config(**options):
    return MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, **options)


def mixtral(device, dtype=torch.float32, **options):
    return build(MixtralForCausalLM, mixtral_config(**options), device, dtype)
