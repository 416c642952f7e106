"""The ops, each usable alone on any model's tensors."""

from liger.ops.add_rms_norm import add_rms_norm
from liger.ops.cross_entropy import cross_entropy
from liger.ops.geglu import geglu, geglu_joined
from liger.ops.layer_norm import layer_norm
from liger.ops.linear_cross_entropy import linear_cross_entropy
from liger.ops.linear_distillation import linear_distillation
from liger.ops.linear_log_prob import linear_log_prob
from liger.ops.qk_norm_rotary import qk_norm_rotary
from liger.ops.rms_norm import rms_norm
from liger.ops.rotary import rotary, rotary_one
from liger.ops.swiglu import swiglu, swiglu_joined
from liger.ops.vocab_parallel_cross_entropy import vocab_parallel_linear_cross_entropy

__all__ = [
    "add_rms_norm",
    "cross_entropy",
    "geglu",
    "geglu_joined",
    "layer_norm",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_log_prob",
    "qk_norm_rotary",
    "rms_norm",
    "rotary",
    "rotary_one",
    "swiglu",
    "swiglu_joined",
    "vocab_parallel_linear_cross_entropy",
]
