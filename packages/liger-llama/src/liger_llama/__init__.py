"""LLaMA for Liger: which class of transformers' LLaMA runs on which kernel.

The LLaMA norm rounds the normalised value to the input's dtype before it multiplies by the weight; its MLP is gated by
`hidden_act`; rotary embeddings rotate whole heads; the head has no bias and no softcap, and may be tied.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import GatedMLP, RMSNorm
from liger.ops import rotary
from liger_llama.__about__ import __version__

__all__ = ["__version__", "apply_liger_kernel_to_llama", "llama"]

llama = Adapter(
    modeling="transformers.models.llama.modeling_llama",
    modules={
        "LlamaRMSNorm": RMSNorm(eps="variance_epsilon"),
        "LlamaMLP": GatedMLP(act="hidden_act"),
    },
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("LlamaForCausalLM"),
)

apply_liger_kernel_to_llama = apply_liger_kernel(llama)
