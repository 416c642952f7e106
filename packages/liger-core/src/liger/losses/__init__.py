"""Preference and policy losses over log-probabilities, in plain torch.

They take what `liger.ops.linear_log_prob` gives for every token, so the logits never exist as a whole. Numbers and
defaults are those of TRL 1.16, but where a loss says how it differs.

    log_prob = linear_log_prob(hidden, lm_head.weight, target).log_prob    # (sequences, tokens)
    chosen, rejected = sequence_log_probs(log_prob, target != -100).chunk(2)

Everything is computed in fp32 (fp64 inputs: in fp64), and each loss is one number of that dtype, the mean over its
batch. What is not counted has no gradient, whatever value it has. Only the policy's log-probabilities have gradients:
those of the reference and of the old policy are taken as constants. A sequence without any counted token has the
log-probability 0, and makes no loss and no gradient NaN.
"""

from liger.losses.grpo import grpo_loss
from liger.losses.preference import cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss
from liger.losses.sequences import mean_nll, sequence_log_probs

__all__ = [
    "cpo_loss",
    "dpo_loss",
    "grpo_loss",
    "kto_loss",
    "mean_nll",
    "orpo_loss",
    "sequence_log_probs",
    "simpo_loss",
]
