"""Logits near their softcap, where tanh is near ±1: neither it nor its derivative loses digits there."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liger.ops import cross_entropy, linear_distillation, linear_log_prob
from liger.testing import assert_as_exact_as

ROWS, CLASSES = 8, 64


def of_cross_entropy(logits, weight, target, softcap):
    return cross_entropy(logits, target, softcap=softcap)


def of_log_prob(logits, weight, target, softcap):
    log_prob, entropy, _ = linear_log_prob(logits, weight, target, softcap=softcap)
    return (log_prob + 0.1 * entropy).mean()


def of_distillation(logits, weight, target, softcap):
    teacher = logits.detach().roll(1, -1)
    return linear_distillation(logits, weight, teacher, weight, beta=0.5, student_softcap=softcap)


def capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap)


def in_torch(loss, logits, target, softcap):
    log_s = capped(logits, softcap).log_softmax(-1)
    if loss is of_cross_entropy:
        return F.nll_loss(log_s, target)
    if loss is of_log_prob:
        return (log_s.gather(-1, target[:, None])[:, 0] - 0.1 * (log_s.exp() * log_s).sum(-1)).mean()
    log_t = logits.detach().roll(1, -1).log_softmax(-1)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=logits.dtype))
    parts = (F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) for log_p in (log_s, log_t))
    return 0.5 * sum(parts)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 1.5, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("loss", [of_cross_entropy, of_log_prob, of_distillation])
def test_gradients_near_the_softcap(device, path, loss, ratio, sign):
    softcap = 30.0
    logits = sign * softcap * ratio + 3 * torch.randn(ROWS, CLASSES, device=device)
    target, eye = torch.randint(CLASSES, (ROWS,), device=device), torch.eye(CLASSES, device=device)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(loss(logits, eye, target, softcap), logits)
    (own,) = torch.autograd.grad(in_torch(loss, logits, target, softcap), logits)
    (truth,) = torch.autograd.grad(in_torch(loss, exact, target, softcap), exact)
    assert_as_exact_as(ours, own, truth, "gradient")
