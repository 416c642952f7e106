"""The Phi models for Liger: which class of transformers runs on which kernel.

Phi and PhiMoE normalise by torch's own LayerNorm, with a bias, whatever PhiMoE's config calls its epsilon; Phi may also
normalise q and k. Phi-3 has LLaMA's RMS norm.

Phi's MLP has no gate, so there is nothing to fuse. Phi-3 computes gate and up by one projection, the gate first. PhiMoE
has experts, which its router samples while it trains. Of Phi-4-multimodal it is the language model and its loss: its
towers for images and sound keep their own code.

Phi slices off the part of each head that is rotated; Phi-3's rotary function does that itself; PhiMoE rotates whole
heads. Phi's head has a bias, PhiMoE's may have one.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import Experts, FusedGatedMLP, LayerNorm, RMSNorm, Stock
from liger.ops import rotary
from liger_phi.__about__ import __version__

__all__ = [
    "__version__",
    "apply_liger_kernel_to_phi",
    "apply_liger_kernel_to_phi3",
    "apply_liger_kernel_to_phi4_multimodal",
    "apply_liger_kernel_to_phimoe",
    "phi",
    "phi3",
    "phi4_multimodal",
    "phimoe",
]

phi = Adapter(
    modeling="transformers.models.phi.modeling_phi",
    modules={
        "nn.LayerNorm": LayerNorm(eps="eps"),
        "PhiMLP": Stock(kind="mlp", reason="has no gate, so that there is no product to fuse its activation with"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("PhiForCausalLM"),
)

phi3 = Adapter(
    modeling="transformers.models.phi3.modeling_phi3",
    modules={
        "Phi3RMSNorm": RMSNorm(eps="variance_epsilon"),
        "Phi3MLP": FusedGatedMLP(act="hidden_act", act_fn="activation_fn"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Phi3ForCausalLM"),
)

phi4_multimodal = Adapter(
    modeling="transformers.models.phi4_multimodal.modeling_phi4_multimodal",
    modules={
        "Phi4MultimodalRMSNorm": RMSNorm(eps="variance_epsilon"),
        "Phi4MultimodalMLP": FusedGatedMLP(act="hidden_act", act_fn="activation_fn"),
        "Phi4MultimodalAudioMLP": Stock(kind="mlp", reason="is the tower's for sound, and gates by its second half"),
        "nn.LayerNorm": Stock(kind="norm", reason="is a tower's"),
        "Phi4MultimodalAudioMeanVarianceNormLayer": Stock(kind="norm", reason="shifts and scales by two constants"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Phi4MultimodalForCausalLM"),
)

phimoe = Adapter(
    modeling="transformers.models.phimoe.modeling_phimoe",
    modules={
        "nn.LayerNorm": LayerNorm(eps="eps"),
        "PhimoeExperts": Experts(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("PhimoeForCausalLM"),
)

apply_liger_kernel_to_phi = apply_liger_kernel(phi)
apply_liger_kernel_to_phi3 = apply_liger_kernel(phi3)
apply_liger_kernel_to_phi4_multimodal = apply_liger_kernel(phi4_multimodal)
apply_liger_kernel_to_phimoe = apply_liger_kernel(phimoe)
