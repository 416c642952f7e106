"""The losses over completions that are better or worse than others: DPO, SimPO, CPO, ORPO and KTO."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from liger.losses.sequences import in_wide


def _check_one_each(op: str, name: str, log_probs: Tensor) -> None:
    if log_probs.ndim != 1:
        raise ValueError(
            f"{op}: {name} has shape {tuple(log_probs.shape)}, expected (B,): sequence_log_probs makes that of tokens"
        )


def _check_smoothing(op: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be from 0 to 1, not {label_smoothing}")


def _preference(margin: Tensor, label_smoothing: float) -> Tensor:
    """Mean cross entropy of "the chosen one is better", which is wrong with probability `label_smoothing`."""
    return -((1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)).mean()


def dpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    ref_chosen_log_probs: Tensor,
    ref_rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, https://arxiv.org/abs/2305.18290, equation 7.

        Δ = (chosen − ref_chosen) − (rejected − ref_rejected)
        loss = mean of − (1 − ε) log σ(β Δ) − ε log σ(−β Δ)

    Args:
        chosen_log_probs: (B,), the sums over the chosen completions, of the policy.
        rejected_log_probs: (B,), the sums over the rejected ones.
        ref_chosen_log_probs: (B,), the same of the reference; a constant.
        ref_rejected_log_probs: (B,), a constant.
        beta: how strongly the policy is held to the reference.
        label_smoothing: ε, the probability that a pair is the wrong way round ("conservative DPO"). TRL 1.16
            ignores its `label_smoothing` in this loss; its "robust" loss is another one.

    Raises:
        ValueError: the shapes are not all (B,), or label_smoothing is not from 0 to 1.
        TypeError: an input is not floating-point.
    """
    _check_one_each("dpo_loss", "chosen_log_probs", chosen_log_probs)
    _check_smoothing("dpo_loss", label_smoothing)
    chosen, rejected, ref_chosen, ref_rejected = in_wide(
        "dpo_loss", chosen_log_probs.shape, chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs,
        ref_chosen_log_probs=ref_chosen_log_probs, ref_rejected_log_probs=ref_rejected_log_probs,
    )  # fmt: skip
    margin = (chosen - ref_chosen.detach()) - (rejected - ref_rejected.detach())
    return _preference(beta * margin, label_smoothing)


def simpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    *,
    beta: float = 0.1,
    gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimisation, without a reference, https://arxiv.org/abs/2405.14734, equation 6.

        margin = β (chosen − rejected) − γ
        loss = mean of − (1 − ε) log σ(margin) − ε log σ(−margin)

    TRL's has `cpo_alpha` (1 by default) times the `mean_nll` of the chosen added to it; this is that of `cpo_alpha=0`.

    Args:
        chosen_log_probs: (B,), the *means* over the tokens of the chosen completions.
        rejected_log_probs: (B,), those over the rejected ones.
        beta: scale of the reward. TRL's default; the paper takes 2 and more.
        gamma: by how much the chosen reward is to be the larger one, TRL's `simpo_gamma`.
        label_smoothing: ε, the probability that a pair is the wrong way round.

    Raises:
        ValueError: the shapes are not both (B,), or label_smoothing is not from 0 to 1.
        TypeError: an input is not floating-point.
    """
    _check_one_each("simpo_loss", "chosen_log_probs", chosen_log_probs)
    _check_smoothing("simpo_loss", label_smoothing)
    chosen, rejected = in_wide(
        "simpo_loss", chosen_log_probs.shape, chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs
    )
    return _preference(beta * (chosen - rejected) - gamma, label_smoothing)


def cpo_loss(
    chosen_log_probs: Tensor,
    rejected_log_probs: Tensor,
    chosen_nll: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Contrastive preference optimisation, without a reference, https://arxiv.org/abs/2401.08417.

        Δ = chosen − rejected
        loss = mean of (− (1 − ε) log σ(β Δ) − ε log σ(−β Δ)) + α · chosen_nll

    Args:
        chosen_log_probs: (B,), the sums over the chosen completions.
        rejected_log_probs: (B,), those over the rejected ones.
        chosen_nll: one number, the `mean_nll` of the chosen tokens.
        beta: scale of the margin.
        alpha: weight of chosen_nll, TRL's `cpo_alpha`. With 0 its value has no part in the loss.
        label_smoothing: ε, the probability that a pair is the wrong way round.

    Raises:
        ValueError: the shapes are not (B,), (B,) and (), or label_smoothing is not from 0 to 1.
        TypeError: an input is not floating-point.
    """
    _check_one_each("cpo_loss", "chosen_log_probs", chosen_log_probs)
    _check_smoothing("cpo_loss", label_smoothing)
    chosen, rejected = in_wide(
        "cpo_loss", chosen_log_probs.shape, chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs
    )
    (nll,) = in_wide("cpo_loss", torch.Size(), chosen_nll=chosen_nll)
    loss = _preference(beta * (chosen - rejected), label_smoothing)
    return loss + alpha * nll if alpha else loss


def orpo_loss(chosen_log_probs: Tensor, rejected_log_probs: Tensor, chosen_nll: Tensor, *, beta: float = 0.1) -> Tensor:
    """Odds ratio preference optimisation, without a reference, https://arxiv.org/abs/2403.07691.

        odds(x) = x − log(1 − eˣ)
        loss = chosen_nll − β · mean of log σ(odds(chosen) − odds(rejected))

    A mean log-probability nearer to 0 than the dtype's epsilon, where the odds are infinite, counts as −epsilon.

    Args:
        chosen_log_probs: (B,), the *means* over the tokens of the chosen completions, at most 0.
        rejected_log_probs: (B,), those over the rejected ones.
        chosen_nll: one number, the `mean_nll` of the chosen sequences; TRL counts their prompts too.
        beta: weight of the odds ratio, the paper's λ.

    Raises:
        ValueError: the shapes are not (B,), (B,) and ().
        TypeError: an input is not floating-point.
    """
    _check_one_each("orpo_loss", "chosen_log_probs", chosen_log_probs)
    chosen, rejected = in_wide(
        "orpo_loss", chosen_log_probs.shape, chosen_log_probs=chosen_log_probs, rejected_log_probs=rejected_log_probs
    )
    (nll,) = in_wide("orpo_loss", torch.Size(), chosen_nll=chosen_nll)
    return nll - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected)).mean()


def _log_odds(log_prob: Tensor) -> Tensor:
    log_prob = log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)
    return log_prob - torch.log(-torch.expm1(log_prob))


def kto_loss(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    label: Tensor,
    kl: Tensor | float = 0.0,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimisation, for completions that are each good or bad, https://arxiv.org/abs/2402.01306.

        r = log_prob − ref_log_prob
        loss = mean of desirable_weight · (1 − σ(β (r − kl))) where label, undesirable_weight · (1 − σ(β (kl − r))) else

    Args:
        log_probs: (B,), the sums over the completions, of the policy.
        ref_log_probs: (B,), the same of the reference; a constant.
        label: (B,), bool: whether the completion is desirable.
        kl: how far policy and reference are apart: one number, the mean of log_prob − ref_log_prob over completions of
            other prompts, and over all processes. A constant; less than 0 counts as 0. 0 for APO-zero.
        beta: how strongly the policy is held to the reference.
        desirable_weight: weight of the desirable completions.
        undesirable_weight: weight of the others.

    Raises:
        ValueError: the shapes are not all (B,), or kl is not one number.
        TypeError: a log-probability is not floating-point, or label is not bool.
    """
    _check_one_each("kto_loss", "log_probs", log_probs)
    if label.dtype != torch.bool:
        raise TypeError(f"kto_loss: label must be bool, not {label.dtype}")
    if label.shape != log_probs.shape:
        raise ValueError(f"kto_loss: label has shape {tuple(label.shape)}, expected {tuple(log_probs.shape)}")
    policy, reference = in_wide("kto_loss", log_probs.shape, log_probs=log_probs, ref_log_probs=ref_log_probs)
    if isinstance(kl, Tensor) and kl.numel() != 1:
        raise ValueError(f"kto_loss: kl has shape {tuple(kl.shape)}, expected one number")
    offset = kl.detach().to(policy).clamp(min=0).reshape(()) if isinstance(kl, Tensor) else max(kl, 0.0)
    gain = beta * (policy - reference.detach() - offset)
    losses = torch.where(label, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))
    return losses.mean()
