"""From the log-probabilities of tokens to those of sequences, and what every loss checks of them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from liger.ops.launch import may_look_at


def in_wide(op: str, shape: torch.Size, **tensors: Tensor) -> list[Tensor]:
    """The tensors in fp32 or fp64; refuses by name what has another shape, as it would be broadcast in silence."""
    for name, tensor in tensors.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating-point, not {tensor.dtype}")
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors.values()]


def counted_tokens(op: str, log_probs: Tensor, mask: Tensor) -> Tensor:
    """`mask` as bool; refuses what is not of (B, T), and what may be weights or labels: all but 0 would count as 1.

    Integers are looked at where they may be.
    """
    if log_probs.ndim != 2:
        raise ValueError(f"{op}: log_probs has shape {tuple(log_probs.shape)}, expected (B, T)")
    if mask.shape != log_probs.shape:
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected {tuple(log_probs.shape)}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"{op}: mask must be bool or integers, which tokens count, not {mask.dtype}")
    counted = mask.bool()
    if mask.dtype != torch.bool and may_look_at(mask):
        others = mask[mask != counted]
        if others.numel():
            raise ValueError(f"{op}: mask has the value {others[0].item()}, expected 0 and 1 alone")
    return counted


def sequence_log_probs(log_probs: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"] = "sum") -> Tensor:
    """Log-probability of each sequence, from those of its tokens.

    Args:
        log_probs: (B, T), floating-point: `linear_log_prob(…).log_prob`.
        mask: (B, T), bool or integers, 0 and 1: the tokens that count, such as `target != ignore_index`.
        reduction: "sum" (DPO, CPO, KTO), or "mean" over the counted tokens (ORPO, SimPO).

    Returns:
        (B,), fp32 (fp64 for fp64 inputs); 0 where no token counts.

    Raises:
        ValueError: the shapes differ, a mask on the CPU has a value beside 0 and 1, or reduction is unknown.
        TypeError: log_probs is not floating-point, or mask is.

    Example:
        >>> log_probs = torch.tensor([[-1.0, -2.0, -4.0], [-3.0, -5.0, 0.0]])
        >>> sequence_log_probs(log_probs, torch.tensor([[1, 1, 0], [1, 1, 0]]), reduction="mean")
        tensor([-1.5000, -4.0000])
    """
    op = "sequence_log_probs"
    counted = counted_tokens(op, log_probs, mask)
    if reduction not in ("sum", "mean"):
        raise ValueError(f"{op}: reduction must be 'sum' or 'mean', not {reduction!r}")
    (wide,) = in_wide(op, log_probs.shape, log_probs=log_probs)
    sums = wide.where(counted, 0).sum(-1)
    return sums if reduction == "sum" else sums / counted.sum(-1).clamp(min=1)


def mean_nll(log_probs: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-likelihood of all counted tokens of the batch: the `chosen_nll` of `orpo_loss` and `cpo_loss`.

    Arguments and errors are those of `sequence_log_probs`. Returns one number, 0 where no token counts.
    """
    counted = counted_tokens("mean_nll", log_probs, mask)
    (wide,) = in_wide("mean_nll", log_probs.shape, log_probs=log_probs)
    return -wide.where(counted, 0).sum() / counted.sum().clamp(min=1)
