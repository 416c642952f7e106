"""The LLaMA models for Liger: which class of transformers runs on which kernel.

The LLaMA norm rounds the normalised value to the input's dtype before it multiplies by the weight; the MLP is gated by
`hidden_act`; rotary embeddings rotate whole heads; the head has no bias and no softcap, and may be tied.

Llama 4's norm is the same under other names, and its norm of q and k has no weight. Mllama is Llama 3.2 Vision, whose
text model returns fp32 logits. DiffLlama normalises the difference of its two attentions by `nn.RMSNorm`,
which rounds once.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import GatedMLP, RMSNorm
from liger.ops import rotary
from liger_llama.__about__ import __version__
from liger_llama.llama4_experts import Llama4Experts

__all__ = [
    "__version__",
    "apply_liger_kernel_to_diffllama",
    "apply_liger_kernel_to_llama",
    "apply_liger_kernel_to_llama4",
    "apply_liger_kernel_to_mllama",
    "diffllama",
    "llama",
    "llama4",
    "mllama",
]

llama = Adapter(
    modeling="transformers.models.llama.modeling_llama",
    modules={
        "LlamaRMSNorm": RMSNorm(eps="variance_epsilon"),
        "LlamaMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("LlamaForCausalLM"),
)

llama4 = Adapter(
    modeling="transformers.models.llama4.modeling_llama4",
    modules={
        "Llama4TextRMSNorm": RMSNorm(eps="eps"),
        "Llama4TextL2Norm": RMSNorm(eps="eps"),
        "Llama4TextMLP": GatedMLP(act="hidden_act", act_fn="activation_fn"),
        "Llama4TextExperts": Llama4Experts(),
    },
    functions={"apply_rotary_emb": "rotates neighbours by complex factors; the kernel rotates halves by cos and sin"},
    head=CausalLM("Llama4ForCausalLM"),
)

mllama = Adapter(
    modeling="transformers.models.mllama.modeling_mllama",
    modules={
        "MllamaTextRMSNorm": RMSNorm(eps="variance_epsilon"),
        "MllamaTextMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=(CausalLM("MllamaForCausalLM"), CausalLM("MllamaForConditionalGeneration")),
)

diffllama = Adapter(
    modeling="transformers.models.diffllama.modeling_diffllama",
    modules={
        "DiffLlamaRMSNorm": RMSNorm(eps="variance_epsilon"),
        "nn.RMSNorm": RMSNorm(eps="eps", cast="gemma"),
        "DiffLlamaMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("DiffLlamaForCausalLM"),
)

apply_liger_kernel_to_llama = apply_liger_kernel(llama)
apply_liger_kernel_to_llama4 = apply_liger_kernel(llama4)
apply_liger_kernel_to_mllama = apply_liger_kernel(mllama)
apply_liger_kernel_to_diffllama = apply_liger_kernel(diffllama)
