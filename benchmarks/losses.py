"""The losses of alignment and distillation: from the whole logits, and from `liger.ops` that never hold them.

Forward and backward from a head's input and weight, at the vocabulary of Llama 3. `python -m benchmarks --op losses`
measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.experts import Record
from benchmarks.measure import gpu_ms, or_say_why, peak_mib, wall_ms
from liger import losses
from liger.ops import linear_distillation, linear_log_prob

NAIVE, OURS = "logits", "liger"
IGNORED = -100


class Sizes(NamedTuple):
    """The pairs of sequences, their tokens, and the head's two dimensions."""

    pairs: int
    tokens: int
    hidden: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.pairs} pairs×{self.tokens}, H{self.hidden}, V{self.vocabulary}"


SIZES = Sizes(pairs=4, tokens=1024, hidden=2048, vocabulary=128256)
TINY = Sizes(pairs=2, tokens=8, hidden=16, vocabulary=50)


class Batch:
    """The head, its input, and what a loss takes as constants; the second half of the sequences is the rejected one.

    The teacher is twice as wide as its student.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        torch.manual_seed(0)
        many, shape = 2 * sizes.pairs, (2 * sizes.pairs, sizes.tokens)
        self.hidden = torch.randn(*shape, sizes.hidden, device=device, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(sizes.vocabulary, sizes.hidden, device=device, dtype=torch.bfloat16)
        self.weight = (weight * sizes.hidden**-0.5).requires_grad_()
        self.target = torch.randint(sizes.vocabulary, shape, device=device)
        lengths = torch.linspace(sizes.tokens / 2, sizes.tokens, many, device=device).long()
        self.mask = torch.arange(sizes.tokens, device=device) < lengths[:, None]
        self.target.masked_fill_(~self.mask, IGNORED)
        with torch.no_grad():
            log_prob = linear_log_prob(self.hidden, self.weight, self.target).log_prob
        self.old, self.reference = (log_prob + 0.1 * torch.randn_like(log_prob) for _ in range(2))
        self.advantages = torch.randn(many, device=device)
        self.label = torch.arange(many, device=device) < sizes.pairs
        width = 2 * sizes.hidden
        self.teacher_hidden = torch.randn(*shape, width, device=device, dtype=torch.bfloat16)
        self.teacher_weight = torch.randn(sizes.vocabulary, width, device=device, dtype=torch.bfloat16) * width**-0.5


Loss = Callable[[Batch], Tensor]


def _from_logits(batch: Batch) -> Tensor:
    logits = F.linear(batch.hidden, batch.weight)
    return logits.float().log_softmax(-1).gather(-1, batch.target.clamp(min=0)[..., None])[..., 0]


def _fused(batch: Batch) -> Tensor:
    return linear_log_prob(batch.hidden, batch.weight, batch.target, ignore_index=IGNORED).log_prob


def _over_log_probs(loss: Callable[[Tensor, Batch], Tensor]) -> tuple[Loss, Loss]:
    """(naive, ours) of a loss that takes the tokens' log-probabilities."""
    return (lambda batch: loss(_from_logits(batch), batch)), (lambda batch: loss(_fused(batch), batch))


def _sums(log_prob: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return losses.sequence_log_probs(log_prob, batch.mask).chunk(2)


def _means(log_prob: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    return losses.sequence_log_probs(log_prob, batch.mask, reduction="mean").chunk(2)


def _chosen_nll(log_prob: Tensor, batch: Batch) -> Tensor:
    return losses.mean_nll(log_prob.chunk(2)[0], batch.mask.chunk(2)[0])


def _dpo(log_prob: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _sums(log_prob, batch)
    ref_chosen, ref_rejected = _sums(batch.reference, batch)
    return losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected)


def _orpo(log_prob: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _means(log_prob, batch)
    return losses.orpo_loss(chosen, rejected, _chosen_nll(log_prob, batch))


def _simpo(log_prob: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _means(log_prob, batch)
    return losses.simpo_loss(chosen, rejected)


def _cpo(log_prob: Tensor, batch: Batch) -> Tensor:
    chosen, rejected = _sums(log_prob, batch)
    return losses.cpo_loss(chosen, rejected, _chosen_nll(log_prob, batch))


def _kto(log_prob: Tensor, batch: Batch) -> Tensor:
    policy, reference = (losses.sequence_log_probs(t, batch.mask) for t in (log_prob, batch.reference))
    return losses.kto_loss(policy, reference, batch.label)


def _grpo(log_prob: Tensor, batch: Batch) -> Tensor:
    return losses.grpo_loss(
        log_prob, batch.advantages, batch.mask, old_log_probs=batch.old, ref_log_probs=batch.reference, beta=0.04
    )


def _gkd_from_logits(batch: Batch) -> Tensor:
    student = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    teacher = F.linear(batch.teacher_hidden, batch.teacher_weight).float().log_softmax(-1)
    mixture = torch.logaddexp(student, teacher) - math.log(2)
    parts = (F.kl_div(mixture, p, reduction="none", log_target=True)[batch.mask].sum() for p in (student, teacher))
    return sum(parts) / 2 / batch.mask.sum()


def _kl_from_logits(batch: Batch) -> Tensor:
    student = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
    teacher = F.linear(batch.teacher_hidden, batch.teacher_weight).float().log_softmax(-1)
    divergence = F.kl_div(student, teacher, reduction="none", log_target=True)
    return divergence[batch.mask].sum() / batch.mask.sum()


def _distillation(beta: float) -> Loss:
    return lambda batch: linear_distillation(
        batch.hidden, batch.weight, batch.teacher_hidden, batch.teacher_weight, batch.target, beta=beta
    )


LOSSES: dict[str, tuple[Loss, Loss]] = {
    "DPO": _over_log_probs(_dpo),
    "ORPO": _over_log_probs(_orpo),
    "SimPO": _over_log_probs(_simpo),
    "CPO": _over_log_probs(_cpo),
    "KTO": _over_log_probs(_kto),
    "GRPO": _over_log_probs(_grpo),
    "GKD": (_gkd_from_logits, _distillation(beta=0.5)),
    "KL": (_kl_from_logits, _distillation(beta=0.0)),
}
"""Name → (naive, ours): each from a batch to the loss, whose gradients of hidden states and weight are taken."""


def _step(loss: Loss, batch: Batch) -> tuple[Tensor, ...]:
    value = loss(batch)
    return value.detach(), *torch.autograd.grad(value, (batch.hidden, batch.weight))


def _figures(loss: Loss, batch: Batch, device: torch.device) -> Record:
    on_gpu = device.type == "cuda"

    def both() -> tuple[Tensor, ...]:
        return _step(loss, batch)

    return {
        "gpu_ms": gpu_ms(both) if on_gpu else None,
        "wall_ms": wall_ms(both, device),
        "peak_mib": peak_mib(both) if on_gpu else None,
    }


def _say(name: str, sizes: Sizes, way: str, record: Record) -> None:
    shown = "  ".join(f"{key} {value:,.3f}" for key, value in record.items() if isinstance(value, float))
    print(f"losses   {name:<6} {sizes!s:<34} {way:<8} {shown or record}", flush=True)


def all_losses(
    device: torch.device, tiny: bool = False, save: Callable[[list[Any]], None] = lambda results: None
) -> list[dict[str, Any]]:
    """Every loss, from the logits and ours; one that fails is recorded with its error."""
    sizes = TINY if tiny else SIZES
    batch = Batch(sizes, device)
    results: list[dict[str, Any]] = []
    for name, ways in LOSSES.items():
        measured = {
            way: or_say_why(partial(_figures, loss, batch, device), device)
            for way, loss in zip((NAIVE, OURS), ways, strict=True)
        }
        for way, record in measured.items():
            _say(name, sizes, way, record)
        results.append({"loss": name, "shape": str(sizes), **measured})
        save(results)
    return results
