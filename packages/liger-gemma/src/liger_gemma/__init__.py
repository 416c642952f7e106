"""The Gemma models for Liger: which class of transformers runs on which kernel.

Gemma's norm multiplies by 1 + weight, all in fp32, and rounds once; its weights start at zero. That of Gemma 3n and
Gemma 4 multiplies by the weight itself, and has none where it normalises values or a router's input. The MLPs are gated
by a GELU, which Gemma names `hidden_act` and its successors `hidden_activation`. Gemma 3n makes some gates sparse
first; T5Gemma and T5Gemma 2 drop values out before the last projection. Beside each MLP, Gemma 4 may have experts;
Gemma 4 Unified has none, and no towers: images and sound become tokens by a projection.

Rotary embeddings rotate q and k together; Gemma 3n and both of Gemma 4 rotate one at a time, because later layers have
no keys of their own. T5Gemma 2 attends to its encoder and to itself at once, and rotates the keys of itself alone.
RecurrentGemma rotates half of each head.

The logits are capped by `final_logit_softcapping`, where it is not None; Gemma has no cap, RecurrentGemma calls it
`logits_soft_cap`, T5Gemma and T5Gemma 2 have it in their decoder's config, and do not shift their labels. Of the models
that take more than text, Gemma 3's does not apply the cap; the towers keep their own code, but for norms of the
language model's class.
"""

from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import Experts, GatedMLP, RMSNorm
from liger.ops import rotary, rotary_one
from liger_gemma.__about__ import __version__
from liger_gemma.sparse_gated_mlp import SparseGatedMLP

__all__ = [
    "__version__",
    "apply_liger_kernel_to_gemma",
    "apply_liger_kernel_to_gemma2",
    "apply_liger_kernel_to_gemma3",
    "apply_liger_kernel_to_gemma3n",
    "apply_liger_kernel_to_gemma4",
    "apply_liger_kernel_to_gemma4_unified",
    "apply_liger_kernel_to_recurrent_gemma",
    "apply_liger_kernel_to_t5gemma",
    "apply_liger_kernel_to_t5gemma2",
    "apply_liger_kernel_to_vaultgemma",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "recurrent_gemma",
    "t5gemma",
    "t5gemma2",
    "vaultgemma",
]

_NORM = RMSNorm(eps="eps", offset=1.0, cast="gemma")
_NORM_WITHOUT_OFFSET = RMSNorm(eps="eps", cast="gemma")
_MLP = GatedMLP(act="hidden_activation")

gemma = Adapter(
    modeling="transformers.models.gemma.modeling_gemma",
    modules={"GemmaRMSNorm": _NORM, "GemmaMLP": GatedMLP(act="hidden_act")},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("GemmaForCausalLM"),
)

gemma2 = Adapter(
    modeling="transformers.models.gemma2.modeling_gemma2",
    modules={"Gemma2RMSNorm": _NORM, "Gemma2MLP": _MLP},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("Gemma2ForCausalLM", softcap="final_logit_softcapping"),
)

gemma3 = Adapter(
    modeling="transformers.models.gemma3.modeling_gemma3",
    modules={"Gemma3RMSNorm": _NORM, "Gemma3MLP": _MLP},
    functions={"apply_rotary_pos_emb": rotary},
    head=(
        CausalLM("Gemma3ForCausalLM", softcap="final_logit_softcapping"),
        CausalLM("Gemma3ForConditionalGeneration"),
    ),
)

gemma3n = Adapter(
    modeling="transformers.models.gemma3n.modeling_gemma3n",
    modules={"Gemma3nRMSNorm": _NORM_WITHOUT_OFFSET, "Gemma3nTextMLP": SparseGatedMLP(act="hidden_activation")},
    functions={"apply_rotary_pos_emb": rotary_one},
    head=(
        CausalLM("Gemma3nForCausalLM", softcap="final_logit_softcapping"),
        CausalLM("Gemma3nForConditionalGeneration", softcap="text_config.final_logit_softcapping"),
    ),
)

gemma4 = Adapter(
    modeling="transformers.models.gemma4.modeling_gemma4",
    modules={
        "Gemma4RMSNorm": _NORM_WITHOUT_OFFSET,
        "Gemma4TextMLP": _MLP,
        "Gemma4TextExperts": Experts(act="hidden_activation"),
    },
    functions={"apply_rotary_pos_emb": rotary_one},
    head=(
        CausalLM("Gemma4ForCausalLM", softcap="final_logit_softcapping"),
        CausalLM("Gemma4ForConditionalGeneration", softcap="text_config.final_logit_softcapping"),
    ),
)

gemma4_unified = Adapter(
    modeling="transformers.models.gemma4_unified.modeling_gemma4_unified",
    modules={"Gemma4UnifiedRMSNorm": _NORM_WITHOUT_OFFSET, "Gemma4UnifiedTextMLP": _MLP},
    functions={"apply_rotary_pos_emb": rotary_one},
    head=(
        CausalLM("Gemma4UnifiedForCausalLM", softcap="final_logit_softcapping"),
        CausalLM("Gemma4UnifiedForConditionalGeneration", softcap="text_config.final_logit_softcapping"),
    ),
)

recurrent_gemma = Adapter(
    modeling="transformers.models.recurrent_gemma.modeling_recurrent_gemma",
    modules={"RecurrentGemmaRMSNorm": _NORM, "RecurrentGemmaMlp": _MLP},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("RecurrentGemmaForCausalLM", softcap="logits_soft_cap"),
)

vaultgemma = Adapter(
    modeling="transformers.models.vaultgemma.modeling_vaultgemma",
    modules={"VaultGemmaRMSNorm": _NORM, "VaultGemmaMLP": _MLP},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM("VaultGemmaForCausalLM", softcap="final_logit_softcapping"),
)

t5gemma = Adapter(
    modeling="transformers.models.t5gemma.modeling_t5gemma",
    modules={"T5GemmaRMSNorm": _NORM, "T5GemmaMLP": GatedMLP(act="hidden_activation", dropout="dropout")},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM(
        "T5GemmaForConditionalGeneration",
        head="lm_head.out_proj",
        softcap="decoder.final_logit_softcapping",
        loss="ForMaskedLMLoss",
    ),
)

t5gemma2 = Adapter(
    modeling="transformers.models.t5gemma2.modeling_t5gemma2",
    modules={"T5Gemma2RMSNorm": _NORM, "T5Gemma2MLP": GatedMLP(act="hidden_activation", dropout="dropout")},
    functions={"apply_rotary_pos_emb": rotary},
    head=CausalLM(
        "T5Gemma2ForConditionalGeneration",
        head="lm_head.out_proj",
        softcap="decoder.final_logit_softcapping",
        loss="ForMaskedLMLoss",
    ),
)

apply_liger_kernel_to_gemma = apply_liger_kernel(gemma, mlp="geglu")
apply_liger_kernel_to_gemma2 = apply_liger_kernel(gemma2, mlp="geglu")
apply_liger_kernel_to_gemma3 = apply_liger_kernel(gemma3, mlp="geglu")
apply_liger_kernel_to_gemma3n = apply_liger_kernel(gemma3n, mlp="geglu")
apply_liger_kernel_to_gemma4 = apply_liger_kernel(gemma4, mlp="geglu")
apply_liger_kernel_to_gemma4_unified = apply_liger_kernel(gemma4_unified, mlp="geglu")
apply_liger_kernel_to_recurrent_gemma = apply_liger_kernel(recurrent_gemma, mlp="geglu")
apply_liger_kernel_to_vaultgemma = apply_liger_kernel(vaultgemma, mlp="geglu")
apply_liger_kernel_to_t5gemma = apply_liger_kernel(t5gemma, mlp="geglu")
apply_liger_kernel_to_t5gemma2 = apply_liger_kernel(t5gemma2, mlp="geglu")
