"""The Mistral models for Liger: which class of transformers runs on which kernel.

Norms and MLPs are LLaMA's. Mixtral and Mistral 4 route tokens to experts, whose gated activation runs in the experts
dispatch of transformers. Mistral 4 compresses its attention, norms what it compressed, and rotates neighbouring pairs.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import Experts, GatedMLP, RMSNorm, Stock
from liger.ops import rotary
from liger_mistral.__about__ import __version__
from liger_mistral.rotary_pairs import rotary_pairs

__all__ = [
    "__version__",
    "apply_liger_kernel_to_ministral",
    "apply_liger_kernel_to_ministral3",
    "apply_liger_kernel_to_mistral",
    "apply_liger_kernel_to_mistral3",
    "apply_liger_kernel_to_mistral4",
    "apply_liger_kernel_to_mixtral",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mistral4",
    "mixtral",
]

mistral = Adapter(
    modeling="transformers.models.mistral.modeling_mistral",
    modules={
        "MistralRMSNorm": RMSNorm(eps="variance_epsilon"),
        "MistralMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("MistralForCausalLM"),
)

ministral = Adapter(
    modeling="transformers.models.ministral.modeling_ministral",
    modules={
        "MinistralRMSNorm": RMSNorm(eps="variance_epsilon"),
        "MinistralMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("MinistralForCausalLM"),
)

ministral3 = Adapter(
    modeling="transformers.models.ministral3.modeling_ministral3",
    modules={
        "Ministral3RMSNorm": RMSNorm(eps="variance_epsilon"),
        "Ministral3MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Ministral3ForCausalLM"),
)

mistral3 = Adapter(
    modeling="transformers.models.mistral3.modeling_mistral3",
    modules={"Mistral3RMSNorm": Stock(kind="norm", reason="is the projector's, and sees nothing but images")},
    head=CausalLM("Mistral3ForConditionalGeneration"),
)

mixtral = Adapter(
    modeling="transformers.models.mixtral.modeling_mixtral",
    modules={
        "MixtralRMSNorm": RMSNorm(eps="variance_epsilon"),
        "MixtralExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("MixtralForCausalLM"),
)

mistral4 = Adapter(
    modeling="transformers.models.mistral4.modeling_mistral4",
    modules={
        "Mistral4RMSNorm": RMSNorm(eps="variance_epsilon"),
        "Mistral4MLP": GatedMLP(act="hidden_act"),
        "Mistral4Experts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary, "apply_rotary_pos_emb_interleave": rotary_pairs},
    head=CausalLM("Mistral4ForCausalLM"),
)

apply_liger_kernel_to_mistral = apply_liger_kernel(mistral)
apply_liger_kernel_to_ministral = apply_liger_kernel(ministral)
apply_liger_kernel_to_ministral3 = apply_liger_kernel(ministral3)
apply_liger_kernel_to_mistral3 = apply_liger_kernel(mistral3)
apply_liger_kernel_to_mixtral = apply_liger_kernel(mixtral)
apply_liger_kernel_to_mistral4 = apply_liger_kernel(mistral4)
