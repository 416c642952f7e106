"""The Qwen models for Liger: which class of transformers runs on which kernel.

Qwen 2 and 3 have LLaMA's norm (Qwen 3 also on each head of q and k, before they are rotated), an MLP gated by
`hidden_act`, and a head without bias or softcap. In a mixture of experts, the experts' activation is fused within
transformers' own dispatch; the shared expert is an MLP like any other; router and auxiliary loss are not touched.

Qwen3-Next and Qwen 3.5 multiply by `1 + weight` and round once, rotate the first quarter of a head, and mix linear with
full attention. Of a linear attention only the gated norm of its output runs on kernels.

Of the models that see images (Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen 3.5) it is the language model and its loss; the
vision tower keeps its own code, but for Qwen2.5-VL's norms, which are the language model's class. Positions of three
axes have become plain cos and sin before attention sees them.

Of Qwen2.5-Omni and Qwen3-Omni, which hear and speak too, it is the thinker, the language model that answers. Of what
speaks (talker, code predictor, code to wave) only what is of the thinker's own classes runs on kernels, and each rotary
embedding; its losses, over a few thousand codes, are transformers'. Qwen2.5-Omni's MLP has no config to name its
activation. Qwen3-ASR's language model is Qwen 3's, and its own file has the head alone.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import Experts, GatedMLP, RMSNorm
from liger.ops import rotary
from liger_qwen.__about__ import __version__
from liger_qwen.gated_rms_norm import GatedRMSNorm

__all__ = [
    "__version__",
    "apply_liger_kernel_to_qwen2",
    "apply_liger_kernel_to_qwen2_5_omni",
    "apply_liger_kernel_to_qwen2_5_vl",
    "apply_liger_kernel_to_qwen2_moe",
    "apply_liger_kernel_to_qwen2_vl",
    "apply_liger_kernel_to_qwen3",
    "apply_liger_kernel_to_qwen3_5",
    "apply_liger_kernel_to_qwen3_5_moe",
    "apply_liger_kernel_to_qwen3_asr",
    "apply_liger_kernel_to_qwen3_moe",
    "apply_liger_kernel_to_qwen3_next",
    "apply_liger_kernel_to_qwen3_omni_moe",
    "apply_liger_kernel_to_qwen3_vl",
    "apply_liger_kernel_to_qwen3_vl_moe",
    "qwen2",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_asr",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
]

qwen2 = Adapter(
    modeling="transformers.models.qwen2.modeling_qwen2",
    modules={
        "Qwen2RMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen2MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen2ForCausalLM"),
)

qwen2_moe = Adapter(
    modeling="transformers.models.qwen2_moe.modeling_qwen2_moe",
    modules={
        "Qwen2MoeRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen2MoeMLP": GatedMLP(act="hidden_act"),
        "Qwen2MoeExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen2MoeForCausalLM"),
)

qwen2_vl = Adapter(
    modeling="transformers.models.qwen2_vl.modeling_qwen2_vl",
    modules={
        "Qwen2VLRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen2MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen2VLForConditionalGeneration"),
)

qwen2_5_vl = Adapter(
    modeling="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
    modules={
        "Qwen2_5_VLRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen2MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen2_5_VLForConditionalGeneration"),
)

qwen3 = Adapter(
    modeling="transformers.models.qwen3.modeling_qwen3",
    modules={
        "Qwen3RMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3ForCausalLM"),
)

qwen3_moe = Adapter(
    modeling="transformers.models.qwen3_moe.modeling_qwen3_moe",
    modules={
        "Qwen3MoeRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3MoeMLP": GatedMLP(act="hidden_act"),
        "Qwen3MoeExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3MoeForCausalLM"),
)

qwen3_next = Adapter(
    modeling="transformers.models.qwen3_next.modeling_qwen3_next",
    modules={
        "Qwen3NextRMSNorm": RMSNorm(eps="eps", offset=1.0, cast="gemma"),
        "Qwen3NextRMSNormGated": GatedRMSNorm(eps="variance_epsilon"),
        "Qwen3NextMLP": GatedMLP(act="hidden_act"),
        "Qwen3NextExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3NextForCausalLM"),
)

qwen3_vl = Adapter(
    modeling="transformers.models.qwen3_vl.modeling_qwen3_vl",
    modules={
        "Qwen3VLTextRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3VLTextMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3VLForConditionalGeneration"),
)

qwen3_vl_moe = Adapter(
    modeling="transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe",
    modules={
        "Qwen3VLMoeTextRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3VLMoeTextMLP": GatedMLP(act="hidden_act"),
        "Qwen3VLMoeTextExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3VLMoeForConditionalGeneration"),
)

qwen3_5 = Adapter(
    modeling="transformers.models.qwen3_5.modeling_qwen3_5",
    modules={
        "Qwen3_5RMSNorm": RMSNorm(eps="eps", offset=1.0, cast="gemma"),
        "Qwen3_5RMSNormGated": GatedRMSNorm(eps="variance_epsilon"),
        "Qwen3_5MLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=(CausalLM("Qwen3_5ForCausalLM"), CausalLM("Qwen3_5ForConditionalGeneration")),
)

qwen3_5_moe = Adapter(
    modeling="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
    modules={
        "Qwen3_5MoeRMSNorm": RMSNorm(eps="eps", offset=1.0, cast="gemma"),
        "Qwen3_5MoeRMSNormGated": GatedRMSNorm(eps="variance_epsilon"),
        "Qwen3_5MoeMLP": GatedMLP(act="hidden_act"),
        "Qwen3_5MoeExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=(CausalLM("Qwen3_5MoeForCausalLM"), CausalLM("Qwen3_5MoeForConditionalGeneration")),
)

qwen2_5_omni = Adapter(
    modeling="transformers.models.qwen2_5_omni.modeling_qwen2_5_omni",
    modules={
        "Qwen2_5OmniRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen2MLP": GatedMLP(act=None),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen2_5OmniThinkerForConditionalGeneration"),
)

qwen3_omni_moe = Adapter(
    modeling="transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe",
    modules={
        "Qwen3OmniMoeThinkerTextRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3OmniMoeTextRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Qwen3OmniMoeThinkerTextMLP": GatedMLP(act="hidden_act"),
        "Qwen3OmniMoeThinkerTextExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Qwen3OmniMoeThinkerForConditionalGeneration"),
)

qwen3_asr = Adapter(
    modeling="transformers.models.qwen3_asr.modeling_qwen3_asr",
    head=CausalLM("Qwen3ASRForConditionalGeneration"),
)

apply_liger_kernel_to_qwen2 = apply_liger_kernel(qwen2)
apply_liger_kernel_to_qwen2_vl = apply_liger_kernel(qwen2_vl)
apply_liger_kernel_to_qwen2_5_vl = apply_liger_kernel(qwen2_5_vl)
apply_liger_kernel_to_qwen2_moe = apply_liger_kernel(qwen2_moe)
apply_liger_kernel_to_qwen3 = apply_liger_kernel(qwen3)
apply_liger_kernel_to_qwen3_moe = apply_liger_kernel(qwen3_moe)
apply_liger_kernel_to_qwen3_next = apply_liger_kernel(qwen3_next)
apply_liger_kernel_to_qwen3_vl = apply_liger_kernel(qwen3_vl)
apply_liger_kernel_to_qwen3_vl_moe = apply_liger_kernel(qwen3_vl_moe)
apply_liger_kernel_to_qwen3_5 = apply_liger_kernel(qwen3_5)
apply_liger_kernel_to_qwen3_5_moe = apply_liger_kernel(qwen3_5_moe)
apply_liger_kernel_to_qwen2_5_omni = apply_liger_kernel(qwen2_5_omni)
apply_liger_kernel_to_qwen3_omni_moe = apply_liger_kernel(qwen3_omni_moe)
apply_liger_kernel_to_qwen3_asr = apply_liger_kernel(qwen3_asr)
