"""Group relative policy optimisation: the loss over the tokens of completions that have an advantage."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from liger.losses.sequences import counted_tokens, in_wide
from liger.ops.launch import may_look_at

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]

_LARGEST_LOG_RATIO = 80.0  # an infinite ratio would be NaN where it is multiplied by 0: of a masked token, in backward


def grpo_loss(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    loss_type: LossType = "dapo",
    importance_sampling_level: Literal["token", "sequence"] = "token",
    num_items_in_batch: Tensor | float | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """Group relative policy optimisation, https://arxiv.org/abs/2402.03300, and its relatives.

        ratio = exp(log_prob − old_log_prob)            "sequence": of its mean over the sequence's counted tokens
        token = − min(ratio · A, clip(ratio, 1 − ε_low, 1 + ε_high) · A) + β (eᵈ − d − 1)
        d = ref_log_prob − log_prob

    The ratio and eᵈ count as at most e⁸⁰, and beyond that have no gradient; in TRL they make the loss infinite or NaN.

    Args:
        log_probs: (B, T), one for each token of the completions, of the policy.
        advantages: (B,) or (B, T): A, a constant.
        mask: (B, T), bool or integers, 0 and 1: the tokens that count.
        old_log_probs: (B, T), of the policy that wrote the completions; a constant. None: it is the present one.
        ref_log_probs: (B, T), of the reference; a constant. Needed where beta is not 0.
        epsilon_low: ε_low of the clipping, TRL's `epsilon`.
        epsilon_high: ε_high; None for the same as epsilon_low.
        beta: weight of the divergence from the reference.
        loss_type: what the sum of the counted tokens is divided by.
            "grpo": each sequence's by its own number of them, then the mean over the sequences.
            "bnpo": by their number in this batch.
            "dapo": by num_items_in_batch, https://arxiv.org/abs/2503.14476.
            "dr_grpo": by B · max_completion_length, https://arxiv.org/abs/2503.20783.
        importance_sampling_level: "token", or "sequence", https://arxiv.org/abs/2507.18071.
        num_items_in_batch: for "dapo": how many tokens count in all the batches of the optimizer's step, divided by the
            number of processes. None: those of this batch.
        max_completion_length: for "dr_grpo", which needs it: the longest completion that could have been written.

    Raises:
        ValueError: shapes do not fit, a mask on the CPU has a value beside 0 and 1, loss_type or
            importance_sampling_level is unknown, ref_log_probs or max_completion_length is needed or not positive, an
            epsilon is negative, num_items_in_batch is no single number or negative (on a GPU nobody looks), or an
            argument is given that this loss_type does not read.
        TypeError: an input is not floating-point, or mask is.
    """
    op = "grpo_loss"
    counted = counted_tokens(op, log_probs, mask)
    if loss_type not in ("grpo", "bnpo", "dr_grpo", "dapo"):
        raise ValueError(f"{op}: loss_type must be 'grpo', 'bnpo', 'dr_grpo' or 'dapo', not {loss_type!r}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"{op}: importance_sampling_level must be 'token' or 'sequence', not {importance_sampling_level!r}"
        )
    if beta != 0 and ref_log_probs is None:
        raise ValueError(f"{op}: beta={beta} needs ref_log_probs")
    if (max_completion_length is not None) != (loss_type == "dr_grpo"):
        raise ValueError(
            f"{op}: max_completion_length is {max_completion_length}; 'dr_grpo' needs it, no other reads it"
        )
    if max_completion_length is not None and max_completion_length < 1:
        raise ValueError(f"{op}: max_completion_length must be at least 1, not {max_completion_length}")
    if num_items_in_batch is not None and loss_type != "dapo":
        raise ValueError(f"{op}: num_items_in_batch is for 'dapo', not {loss_type!r}")
    if num_items_in_batch is not None:
        _check_items(op, num_items_in_batch)
    if epsilon_high is None:
        epsilon_high = epsilon_low
    if not (epsilon_low >= 0 and epsilon_high >= 0):
        raise ValueError(f"{op}: epsilon_low and epsilon_high must be at least 0, not {epsilon_low}, {epsilon_high}")
    if advantages.shape == log_probs.shape[:1]:
        advantages = advantages[:, None].expand(-1, log_probs.shape[1])
    policy, old, reference, advantage = in_wide(
        op, log_probs.shape, log_probs=log_probs, old_log_probs=log_probs if old_log_probs is None else old_log_probs,
        ref_log_probs=log_probs if ref_log_probs is None else ref_log_probs, advantages=advantages,
    )  # fmt: skip

    # Masked before exp and products: in backward 0 · inf is NaN, whatever is masked after them.
    advantage = advantage.detach().where(counted, 0)
    log_ratio = (policy - old.detach()).where(counted, 0)
    lengths = counted.sum(-1).clamp(min=1)
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / lengths[:, None]
    ratio = log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    tokens = -torch.minimum(ratio * advantage, clipped * advantage)
    if beta != 0:
        behind = (reference.detach() - policy).where(counted, 0)
        tokens = tokens + beta * (torch.expm1(behind.clamp(max=_LARGEST_LOG_RATIO)) - behind)

    sums = tokens.sum(-1)
    if loss_type == "grpo":
        return (sums / lengths).mean()
    if max_completion_length is not None:
        return sums.sum() / (len(sums) * max_completion_length)
    items = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return sums.sum() / (items.to(sums).clamp(min=1).reshape(()) if isinstance(items, Tensor) else max(items, 1))


def _check_items(op: str, items: Tensor | float) -> None:
    if isinstance(items, Tensor):
        if items.numel() != 1:
            raise ValueError(f"{op}: num_items_in_batch has shape {tuple(items.shape)}, expected one number")
        if not may_look_at(items):
            return
        items = items.item()
    if not items >= 0:
        raise ValueError(f"{op}: num_items_in_batch must not be negative, but is {items}")
