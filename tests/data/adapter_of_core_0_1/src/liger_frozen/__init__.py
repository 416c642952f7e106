"""Adapters as they were written for liger-core 0.1. Never edited: they must work with every core below 1."""

from dataclasses import dataclass
from typing import ClassVar

from liger.adapter import Adapter, Kind, Layer
from liger.apply_liger_kernel import apply_liger_kernel
from liger.causal_lm import CausalLM
from liger.layers import Experts, FusedGatedMLP, GatedMLP, LayerNorm, RMSNorm, Stock
from liger.ops import rms_norm, rotary


@dataclass(frozen=True)
class OwnNorm(Layer):
    """A layer of the package's own."""

    eps: str
    kind: ClassVar[Kind] = "norm"

    def declines(self, module):
        """Declines what has no epsilon of that name."""
        return None if hasattr(module, self.eps) else f"has no {self.eps}"

    def forward(self, module, x):
        """The normalised x."""
        return rms_norm(x, module.weight, getattr(module, self.eps), offset=0.0, cast="gemma")


def rotated(q, k, cos, sin, unsqueeze_dim=1):
    """A rotary function of the package's own."""
    q_rotated, k_rotated = rotary(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return q_rotated.to(q.dtype), k_rotated.to(k.dtype)


olmo2 = Adapter(
    modeling="transformers.models.olmo2.modeling_olmo2",
    modules={
        "Olmo2RMSNorm": OwnNorm(eps="variance_epsilon"),
        "Olmo2MLP": GatedMLP(act="hidden_act", act_fn="act_fn", dropout=None),
    },
    functions={"apply_rotary_pos_emb": rotated},
    head=CausalLM("Olmo2ForCausalLM", head="lm_head", softcap=None, loss="ForCausalLMLoss"),
)

starcoder2 = Adapter(
    modeling="transformers.models.starcoder2.modeling_starcoder2",
    modules={"nn.LayerNorm": LayerNorm(eps="eps"), "Starcoder2MLP": Stock("mlp", "has no gate")},
    functions={"apply_rotary_pos_emb": "is left alone here"},
    head=(CausalLM("Starcoder2ForCausalLM"),),
)

unused = (
    RMSNorm(eps="eps", offset=1.0, cast="gemma"),
    FusedGatedMLP(act="hidden_act", act_fn="activation_fn"),
    Experts(act="hidden_act", act_fn="act_fn"),
)

apply_liger_kernel_to_olmo2 = apply_liger_kernel(olmo2, mlp="swiglu")
