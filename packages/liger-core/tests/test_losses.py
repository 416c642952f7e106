"""The preference losses over linear_log_prob, against their papers' formulas from the whole logits in fp64.

Over 300 lines: each loss stands beside its formula in plain torch.
"""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from liger.losses import (
    cpo_loss,
    dpo_loss,
    grpo_loss,
    kto_loss,
    mean_nll,
    orpo_loss,
    sequence_log_probs,
    simpo_loss,
)
from liger.ops import linear_log_prob
from liger.testing import assert_as_exact_as

LENGTHS = {"ragged": (6, 2, 1, 3, 5, 6), "chosen empty": (6, 0, 2, 3, 5, 4), "rejected empty": (6, 1, 2, 0, 5, 4)}
LABEL = torch.tensor([True, True, False, True, False, False])
DEPTH = 4  # roundings between log-probabilities and loss
SEQUENCES, TOKENS, WIDTH, VOCABULARY = 6, 6, 8, 17


class Batch:
    """Six completions, in pairs the first three with the last three, and all that the losses take as constants."""

    def __init__(self, device, lengths=LENGTHS["ragged"]):
        self.hidden = torch.randn(SEQUENCES, TOKENS, WIDTH, device=device, dtype=torch.float64)
        self.weight = torch.randn(VOCABULARY, WIDTH, device=device, dtype=torch.float64) / 2
        self.mask = torch.arange(TOKENS, device=device) < torch.tensor(lengths, device=device)[:, None]
        self.target = torch.randint(VOCABULARY, self.mask.shape, device=device).where(self.mask, -100)
        exact = log_probs_from_logits(self.hidden, self.weight, self.target)
        self.old, self.ref = (exact + 0.4 * torch.randn_like(exact) for _ in range(2))
        self.advantages = torch.tensor([1.3, -0.4, 0.8, -1.1, 1.2, 0.9], device=device, dtype=torch.float64)
        self.label = LABEL.to(device)

    def to(self, dtype):
        """The same, with head and hidden states in `dtype`, and in what the losses compute with the constants."""
        other = copy.copy(self)
        other.hidden, other.weight = self.hidden.to(dtype), self.weight.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        other.old, other.ref, other.advantages = (t.to(wide) for t in (self.old, self.ref, self.advantages))
        return other


def log_probs_from_logits(hidden, weight, target):
    """What a trainer would write: all logits, their log-softmax in fp32 or fp64, and of each row one element."""
    logits = hidden @ weight.T
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]


def counted(log_prob, batch):
    """The counted tokens of each sequence, of different lengths."""
    return [row[: int(row_mask.sum())] for row, row_mask in zip(log_prob, batch.mask, strict=True)]


def sums(log_prob, batch):
    return torch.stack([tokens.sum() for tokens in counted(log_prob, batch)])


def means(log_prob, batch):
    return torch.stack([tokens.sum() / max(len(tokens), 1) for tokens in counted(log_prob, batch)])


def nll(log_prob, batch):
    return -torch.cat(counted(log_prob, batch)[:3]).mean()


def naive_pair(score, smoothing):
    """The smoothed logistic loss, from the probability itself."""
    p = 1 / (1 + torch.exp(-score))
    return -((1 - smoothing) * p.log() + smoothing * (1 - p).log()).mean()


def naive_dpo(log_prob, batch, smoothing=0.0):
    ratio = sums(log_prob, batch) - sums(batch.ref, batch)
    return naive_pair(0.3 * (ratio[:3] - ratio[3:]), smoothing)


def ours_dpo(log_prob, batch, smoothing=0.0):
    pairs = (*sequence_log_probs(log_prob, batch.mask).chunk(2), *sequence_log_probs(batch.ref, batch.mask).chunk(2))
    return dpo_loss(*pairs, beta=0.3, label_smoothing=smoothing)


def naive_simpo(log_prob, batch, smoothing=0.0):
    mean = means(log_prob, batch)
    return naive_pair(2.0 * (mean[:3] - mean[3:]) - 0.7, smoothing)


def ours_simpo(log_prob, batch, smoothing=0.0):
    pair = sequence_log_probs(log_prob, batch.mask, reduction="mean").chunk(2)
    return simpo_loss(*pair, beta=2.0, gamma=0.7, label_smoothing=smoothing)


def naive_cpo(log_prob, batch, smoothing=0.0):
    total = sums(log_prob, batch)
    return naive_pair(0.2 * (total[:3] - total[3:]), smoothing) + 0.6 * nll(log_prob, batch)


def ours_cpo(log_prob, batch, smoothing=0.0):
    pair = sequence_log_probs(log_prob, batch.mask).chunk(2)
    likelihood = mean_nll(log_prob[:3], batch.mask[:3])
    return cpo_loss(*pair, likelihood, beta=0.2, alpha=0.6, label_smoothing=smoothing)


def naive_orpo(log_prob, batch):
    p = means(log_prob, batch).exp()
    odds = p / (1 - p)
    return nll(log_prob, batch) - 0.4 * torch.sigmoid((odds[:3] / odds[3:]).log()).log().mean()


def ours_orpo(log_prob, batch):
    pair = sequence_log_probs(log_prob, batch.mask, reduction="mean").chunk(2)
    return orpo_loss(*pair, mean_nll(log_prob[:3], batch.mask[:3]), beta=0.4)


def naive_kto(log_prob, batch, kl=0.35):
    ratio = sums(log_prob, batch) - sums(batch.ref, batch)
    values = [
        1.5 * (1 - torch.sigmoid(0.3 * (r - kl))) if good else 0.8 * (1 - torch.sigmoid(0.3 * (kl - r)))
        for r, good in zip(ratio, LABEL.tolist(), strict=True)
    ]
    return torch.stack(values).mean()


def ours_kto(log_prob, batch, kl=0.35):
    pair = (sequence_log_probs(t, batch.mask) for t in (log_prob, batch.ref))
    return kto_loss(*pair, batch.label, kl, beta=0.3, desirable_weight=1.5, undesirable_weight=0.8)


def naive_grpo(log_prob, batch, loss_type, level, beta=0.0, old=True):
    """Each token's term on its own, then the four ways to divide their sum."""
    losses = []
    for row, was, ref, advantage in zip(
        counted(log_prob, batch), counted(batch.old if old else log_prob.detach(), batch), counted(batch.ref, batch),
        batch.advantages.tolist(), strict=True,
    ):  # fmt: skip
        change = row - was
        ratio = change.exp() if level == "token" else (change.sum() / max(len(row), 1)).exp().expand(len(row))
        objective = torch.minimum(ratio * advantage, ratio.clip(0.9, 1.3) * advantage)
        losses.append(-objective + beta * (torch.exp(ref - row) - (ref - row) - 1))
    tokens = torch.cat(losses)
    if loss_type == "grpo":
        return sum(each.sum() / max(len(each), 1) for each in losses) / SEQUENCES
    return tokens.sum() / {"bnpo": len(tokens), "dapo": 40, "dr_grpo": SEQUENCES * 9}[loss_type]


def ours_grpo(log_prob, batch, loss_type, level, beta=0.0, old=True):
    reads = {"dapo": {"num_items_in_batch": 40}, "dr_grpo": {"max_completion_length": 9}}.get(loss_type, {})
    return grpo_loss(
        log_prob, batch.advantages, batch.mask, old_log_probs=batch.old if old else None, ref_log_probs=batch.ref,
        epsilon_low=0.1, epsilon_high=0.3, beta=beta, loss_type=loss_type, importance_sampling_level=level, **reads,
    )  # fmt: skip


def both(ours, naive, **options):
    return functools.partial(ours, **options), functools.partial(naive, **options)


LOSSES = {
    "dpo": both(ours_dpo, naive_dpo),
    "dpo smoothed": both(ours_dpo, naive_dpo, smoothing=0.2),
    "simpo": both(ours_simpo, naive_simpo),
    "simpo smoothed": both(ours_simpo, naive_simpo, smoothing=0.2),
    "cpo": both(ours_cpo, naive_cpo),
    "cpo smoothed": both(ours_cpo, naive_cpo, smoothing=0.2),
    "orpo": both(ours_orpo, naive_orpo),
    "kto": both(ours_kto, naive_kto),
    **{
        f"{loss_type} {level}": both(ours_grpo, naive_grpo, loss_type=loss_type, level=level, beta=0.2)
        for loss_type in ("grpo", "bnpo", "dr_grpo", "dapo")
        for level in ("token", "sequence")
    },
    "grpo without reference": both(ours_grpo, naive_grpo, loss_type="grpo", level="token"),
    "grpo on policy": both(ours_grpo, naive_grpo, loss_type="grpo", level="token", old=False),
}


def fused(hidden, weight, target):
    return linear_log_prob(hidden, weight, target).log_prob


def step(log_probs, loss, batch):
    """The loss, and its gradients with respect to hidden states and head weight."""
    hidden, weight = (t.detach().requires_grad_() for t in (batch.hidden, batch.weight))
    value = loss(log_probs(hidden, weight, batch.target), batch)
    return value, *torch.autograd.grad(value, (hidden, weight))


def check(name, device, dtype):
    """Ours and the naive one, both in `dtype`, against the naive one in fp64 on the same inputs."""
    ours, naive = LOSSES[name]
    batch = Batch(device).to(dtype)
    actual, own = step(fused, ours, batch), step(log_probs_from_logits, naive, batch)
    exact = step(log_probs_from_logits, naive, batch.to(torch.float64))
    for what, a, o, e in zip(("loss", "d hidden", "d weight"), actual, own, exact, strict=True):
        assert_as_exact_as(a, o, e, what, depth=DEPTH, computed_in=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("no_interpreter")
def test_losses_and_gradients_are_those_of_the_full_logits(device, name, dtype):
    check(name, device, dtype)


@pytest.mark.parametrize("name", ["dpo", "orpo", "dapo token"])
def test_the_kernels_give_the_same(device, path, name):
    check(name, device, torch.float32)


@pytest.mark.parametrize("empty", ["chosen empty", "rejected empty"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_sequence_without_tokens_makes_nothing_nan(device, name, empty):
    batch = Batch(device, LENGTHS[empty])
    ours, naive = LOSSES[name]
    actual = step(fused, ours, batch)
    for what, a in zip(("loss", "d hidden", "d weight"), actual, strict=True):
        assert a.isfinite().all(), what
    assert (actual[1][~batch.mask] == 0).all()
    if name != "orpo":  # whose odds are infinite there
        for a, e in zip(actual, step(log_probs_from_logits, naive, batch), strict=True):
            assert_as_exact_as(a, e, e, depth=DEPTH)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_tokens_makes_nothing_nan(device, name):
    batch = Batch(device, (0,) * SEQUENCES)
    value, *gradients = step(fused, LOSSES[name][0], batch)
    assert value.isfinite()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_counted_may_have_any_value(device, name, value):
    batch = Batch(device)
    clean = log_probs_from_logits(batch.hidden, batch.weight, batch.target).where(batch.mask, 0).requires_grad_()
    expected = LOSSES[name][0](clean, batch)
    (gradient,) = torch.autograd.grad(expected, clean)

    spoilt = clean.detach().where(batch.mask, value).requires_grad_()
    batch.old, batch.ref = (t.where(batch.mask, value) for t in (batch.old, batch.ref))
    batch.advantages = batch.advantages[:, None].expand_as(batch.mask).where(batch.mask, value)
    got = LOSSES[name][0](spoilt, batch)
    assert torch.equal(got, expected)
    assert torch.equal(torch.autograd.grad(got, spoilt)[0], gradient)


def test_reference_and_old_policy_have_no_gradient(device):
    batch = Batch(device)
    log_prob = log_probs_from_logits(batch.hidden.requires_grad_(), batch.weight, batch.target)
    for name, (ours, _) in LOSSES.items():
        batch.ref, batch.old = (t.detach().requires_grad_() for t in (batch.ref, batch.old))
        constants = torch.autograd.grad(
            ours(log_prob, batch), (batch.ref, batch.old), retain_graph=True, allow_unused=True
        )
        assert constants == (None, None), name


def test_the_present_policy_as_the_old_one_is_a_constant(device):
    """GRPO's first step: every ratio is 1, and the gradient is the policy gradient, not 0."""
    batch = Batch(device)
    log_prob = batch.old.clone().requires_grad_()
    for old in (None, log_prob):
        loss = grpo_loss(log_prob, batch.advantages, batch.mask, old_log_probs=old)
        (gradient,) = torch.autograd.grad(loss, log_prob)
        expected = -batch.advantages[:, None] * batch.mask / batch.mask.sum()
        assert_as_exact_as(gradient, expected, expected)


def test_dapo_counts_the_tokens_of_this_batch_unless_told(device):
    batch = Batch(device).to(torch.float32)
    count = batch.mask.sum()
    alone, told, tensor, bnpo = (
        grpo_loss(batch.ref, batch.advantages, batch.mask, old_log_probs=batch.old, **options)
        for options in (
            {},
            {"num_items_in_batch": 2 * int(count)},
            {"num_items_in_batch": (2 * count).reshape(1).double().cpu()},
            {"loss_type": "bnpo"},
        )
    )
    assert torch.equal(alone, bnpo)
    assert torch.equal(alone, 2 * told)
    assert torch.equal(told, tensor)
    assert tensor.dtype == torch.float32
    assert grpo_loss(batch.ref, batch.advantages, batch.mask & False, num_items_in_batch=0) == 0


def test_every_token_may_have_its_own_advantage(device):
    batch = Batch(device)
    each = batch.advantages[:, None].expand(-1, TOKENS)
    losses = [grpo_loss(batch.ref, a, batch.mask, old_log_probs=batch.old) for a in (batch.advantages, each)]
    assert torch.equal(*losses)


def test_a_negative_divergence_counts_as_none_in_kto(device):
    batch = Batch(device)
    kl = torch.tensor([-2.0], device=device, requires_grad=True)
    assert torch.equal(ours_kto(batch.old, batch, kl=kl), ours_kto(batch.old, batch, kl=0.0))
    assert not ours_kto(batch.old, batch, kl=kl.abs()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_log_probs_are_computed_with_in_fp32(device, name, dtype):
    half = Batch(device)
    wide = copy.copy(half)
    for constant in ("old", "ref", "advantages"):
        setattr(half, constant, getattr(half, constant).to(dtype))
        setattr(wide, constant, getattr(half, constant).float())
    got = LOSSES[name][0](half.old, half)
    assert got.dtype == torch.float32
    assert torch.equal(got, LOSSES[name][0](wide.old, wide))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_beyond_all_numbers_makes_nothing_nan(device, level, advantage):
    """Nor does that of a token that does not count, whose advantage is 0."""
    log_probs = torch.full((1, 3), -1.0, device=device, requires_grad=True)
    mask = torch.tensor([[True, True, False]], device=device)
    advantages = torch.full((1,), advantage, device=device)
    loss = grpo_loss(
        log_probs, advantages, mask, old_log_probs=log_probs.detach() - 90, importance_sampling_level=level
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.isfinite()
    assert torch.equal(gradient, torch.zeros_like(gradient))
    if advantage >= 0:
        torch.testing.assert_close(loss.item(), -1.2 * advantage)


def test_cpo_without_the_chosen_nll_does_not_read_it(device):
    chosen, rejected, nan = (torch.tensor(x, device=device) for x in ([-1.0], [-2.0], math.nan))
    assert cpo_loss(chosen, rejected, nan, alpha=0.0).isfinite()


ONE, TWO, TOKEN = torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, 3)
MASK, THREE = torch.ones(2, 3, dtype=torch.int64), torch.zeros(3)
REFUSED = {
    "rank of sequences": (lambda: dpo_loss(TOKEN, TOKEN, TOKEN, TOKEN), ValueError, r"\(2, 3\), expected \(B,\)"),
    "a column": (lambda: dpo_loss(ONE, ONE, ONE, TWO), ValueError, r"ref_rejected_log_probs has shape \(2, 1\)"),
    "batch": (lambda: simpo_loss(ONE, THREE), ValueError, r"rejected_log_probs has shape \(3,\), expected \(2,\)"),
    "nll of each": (lambda: cpo_loss(ONE, ONE, ONE), ValueError, r"chosen_nll has shape \(2,\), expected \(\)"),
    "orpo": (lambda: orpo_loss(ONE, ONE, ONE), ValueError, "chosen_nll has shape"),
    "smoothing": (lambda: dpo_loss(ONE, ONE, ONE, ONE, label_smoothing=1.1), ValueError, "label_smoothing must be"),
    "integers": (lambda: simpo_loss(ONE, ONE.long()), TypeError, "rejected_log_probs must be floating-point, not"),
    "label": (lambda: kto_loss(ONE, ONE, ONE), TypeError, r"label must be bool, not torch.float32"),
    "label's shape": (lambda: kto_loss(ONE, ONE, TWO.bool()), ValueError, r"label has shape \(2, 1\)"),
    "kl": (lambda: kto_loss(ONE, ONE, ONE.bool(), ONE), ValueError, r"kl has shape \(2,\)"),
    "mask": (lambda: sequence_log_probs(TOKEN, MASK.T), ValueError, r"mask has shape \(3, 2\), expected \(2, 3\)"),
    "weights": (lambda: mean_nll(TOKEN, 0.5 * MASK), TypeError, "mask must be bool or integers, .* not torch.float32"),
    "negative items": (lambda: grpo_loss(TOKEN, ONE, MASK, num_items_in_batch=-1), ValueError, "not be negative"),
    "negative number": (lambda: grpo_loss(TOKEN, ONE, MASK, num_items_in_batch=-1.5), ValueError, "but is -1.5"),
    "negative tensor": (lambda: grpo_loss(TOKEN, ONE, MASK, num_items_in_batch=-ONE[0] - 1), ValueError, "but is -1"),
    "items of each": (lambda: grpo_loss(TOKEN, ONE, MASK, num_items_in_batch=ONE), ValueError, r"has shape \(2,\)"),
    "epsilon": (lambda: grpo_loss(TOKEN, ONE, MASK, epsilon_low=-0.1), ValueError, "at least 0, not -0.1, -0.1"),
    "labels": (lambda: sequence_log_probs(TOKEN, MASK - 101), ValueError, "mask has the value -100, expected 0 and 1"),
    "tokens": (lambda: mean_nll(ONE, ONE), ValueError, r"log_probs has shape \(2,\), expected \(B, T\)"),
    "reduction": (lambda: sequence_log_probs(TOKEN, MASK, reduction="none"), ValueError, "'sum' or 'mean', not 'none'"),
    "loss_type": (lambda: grpo_loss(TOKEN, ONE, MASK, loss_type="gpro"), ValueError, "loss_type must be .* not 'gpro'"),
    "level": (lambda: grpo_loss(TOKEN, ONE, MASK, importance_sampling_level="x"), ValueError, "'token' or 'sequence'"),
    "reference": (lambda: grpo_loss(TOKEN, ONE, MASK, beta=0.1), ValueError, "beta=0.1 needs ref_log_probs"),
    "advantages": (lambda: grpo_loss(TOKEN, TWO, MASK), ValueError, r"advantages has shape \(2, 1\)"),
    "old": (lambda: grpo_loss(TOKEN, ONE, MASK, old_log_probs=TWO), ValueError, "old_log_probs has shape"),
    "length": (lambda: grpo_loss(TOKEN, ONE, MASK, loss_type="dr_grpo"), ValueError, "'dr_grpo' needs it"),
    "length for no one": (lambda: grpo_loss(TOKEN, ONE, MASK, max_completion_length=9), ValueError, "no other reads"),
    "items": (
        lambda: grpo_loss(TOKEN, ONE, MASK, loss_type="grpo", num_items_in_batch=3),
        ValueError,
        "num_items_in_batch is for 'dapo', not 'grpo'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_values_are_not_looked_at_where_there_are_none():
    """Under `vmap` and of FakeTensors; there a mask of integers is taken for what it should be."""
    masks = torch.stack([MASK, MASK.flip(1)])
    mapped = torch.func.vmap(sequence_log_probs, (None, 0))(TOKEN, masks)
    torch.testing.assert_close(mapped, torch.stack([sequence_log_probs(TOKEN, mask) for mask in masks]))
    with FakeTensorMode() as fake:
        token, mask, one = (fake.from_tensor(t) for t in (TOKEN, MASK, ONE))
        assert sequence_log_probs(token, mask).shape == (2,)
        assert grpo_loss(token, one, mask, num_items_in_batch=mask.sum()).shape == ()
