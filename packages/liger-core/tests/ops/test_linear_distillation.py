"""linear_distillation against fp64, through the kernel and through the reference, in several chunks.

Over 300 lines: an op has one file of tests.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from liger.ops import linear_chunks, linear_distillation
from liger.testing import assert_as_exact_as
from liger.testing.error_rule import relative_error
from loss_cases import DTYPES, upstream_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BETAS = [0.0, 0.1, 0.5, 1.0]
SCALINGS = {
    "softcap of the student": {"student_softcap": 3.0},
    "softcap of the teacher": {"teacher_softcap": 2.0},
    "scales": {"student_logit_scale": -0.7, "teacher_logit_scale": 0.3},
    "all": {"student_softcap": 2.0, "student_logit_scale": 1.5, "teacher_softcap": 3.0, "teacher_logit_scale": 0.5},
}
NAMES = ("student_input", "student_weight", "teacher_input", "teacher_weight", "target", "student_bias", "teacher_bias")


def naive(
    student_input, student_weight, teacher_input, teacher_weight, target=None, *, student_bias=None, teacher_bias=None,
    beta=0.5, temperature=1.0, ignore_index=-100, reduction="mean", denominator=None, accum_dtype=None,
    student_softcap=None, teacher_softcap=None, student_logit_scale=1.0, teacher_logit_scale=1.0,
):  # fmt: skip
    """What a trainer would write with torch's own functions: both heads, the logits in fp32, everything in that."""

    def log_p(x, weight, bias, scale, softcap):
        logits = F.linear(x, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return (logits / temperature).log_softmax(-1)

    def divergence(p, q):
        return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    s = log_p(student_input, student_weight, student_bias, student_logit_scale, student_softcap)
    t = log_p(teacher_input, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap).to(s.dtype).detach()
    if beta == 0:
        loss = divergence(t, s)
    elif beta == 1:
        loss = divergence(s, t)
    else:
        m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
        loss = beta * divergence(t, m) + (1 - beta) * divergence(s, m)
    counts = torch.ones_like(loss, dtype=torch.bool) if target is None else target != ignore_index
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        return loss
    count = counts.sum() if reduction == "mean" else 1
    return loss.sum() / float(count if denominator is None else denominator)


def some(rows, width, columns, device, dtype=torch.float32, ignored=(), teacher_dtype=None):
    """All tensors by name, with logits of a few units; the teacher is a third wider than the student."""

    def head(width, dtype):
        x = torch.randn(rows, width, device=device).to(dtype)
        weight = (2 * torch.randn(columns, width, device=device) / width**0.5).to(dtype)
        return x, weight, torch.randn(columns, device=device).to(dtype)

    x, weight, bias = head(width, dtype)
    y, teacher_weight, teacher_bias = head(width + width // 3, teacher_dtype or dtype)
    target = torch.randint(0, columns, (rows,), device=device)
    target[list(ignored)] = -100
    return dict(zip(NAMES, (x, weight, y, teacher_weight, target, bias, teacher_bias), strict=True))


def run(function, tensors, upstream=None, **options):
    """The loss, and the gradients of the student's input, weight and bias."""
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if k.startswith("student") and t is not None}
    loss = function(**tensors | leaves, **options)
    upstream = None if upstream is None else upstream.to(loss.dtype)
    return loss, *torch.autograd.grad(loss, list(leaves.values()), upstream)


def double(tensors):
    return {k: t.double() if t is not None and t.is_floating_point() else t for k, t in tensors.items()}


def check(tensors, upstream=None, **options):
    """Loss and gradients of linear_distillation obey the error rule; returns them."""
    actual = run(linear_distillation, tensors, upstream, **options)
    own = run(naive, tensors, upstream, **options)
    exact = run(naive, double(tensors), upstream, **options)
    computed_in = tensors["student_input"].dtype
    for name, *three in zip(("loss", "dx", "dW", "db"), actual, own, exact, strict=tensors["student_bias"] is not None):
        assert_as_exact_as(*three, name, computed_in=computed_in)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [3, 1091])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("beta", BETAS)
def test_matches_fp64(device, path, chunk_rows, dtype, columns, reduction, beta):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(3)
    check(some(8, 24, columns, device, dtype, ignored=[2, 7]), upstream_of(reduction, 8, device),
          reduction=reduction, beta=beta)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_many_classes_match_fp64(device, path, chunk_rows, dtype, beta):
    chunk_rows(2)
    check(some(3, 16, 32001, device, dtype), beta=beta)


@pytest.mark.parametrize("temperature", [0.6, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_temperature_matches_fp64(device, path, chunk_rows, temperature, beta):
    chunk_rows(4)
    check(some(6, 16, 300, device, torch.bfloat16, ignored=[0]), beta=beta, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("beta", BETAS)
def test_scaled_and_capped_logits_match_fp64(device, path, chunk_rows, dtype, scaling, beta):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(4)
    check(some(6, 16, 300, device, dtype, ignored=[0]), beta=beta, temperature=0.8, **scaling)


def test_softcap_of_padded_lanes_is_not_summed(device, path):
    """All logits −3 under a softcap of 1: a padded lane, capped to −1 at the least, would weigh as much as a class."""
    three, ones = torch.full((1, 1), -3.0, device=device), torch.ones(1001, 1, device=device)
    for caps in ({"student_softcap": 1.0}, {"teacher_softcap": 1.0}):
        assert linear_distillation(three, ones, three, ones, **caps).abs() < 1e-6


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_teacher_of_another_dtype(device, path, chunk_rows, dtypes):
    chunk_rows(4)
    check(some(6, 16, 300, device, dtypes[0], teacher_dtype=dtypes[1]))


@pytest.mark.parametrize("beta", BETAS)
def test_one_row_by_hand(device, path, beta):
    """p = (1/4, 3/4) of the student and (1/2, 1/2) of the teacher."""
    student, teacher = (torch.tensor([[p, 1 - p]], device=device, dtype=torch.float64) for p in (0.25, 0.5))
    m = (1 - beta) * student + beta * teacher
    parts = [(t * (t / m).log()).sum().item() for t in (teacher, student)]
    shares = {0.0: (1, 0), 1.0: (0, 1)}.get(beta, (beta, 1 - beta))
    one = torch.ones(1, 1, device=device)
    loss = linear_distillation(one, student.log().T.float(), one, teacher.log().T.float(), beta=beta)
    assert loss.item() == pytest.approx(shares[0] * parts[0] + shares[1] * parts[1], rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(device, path, beta):
    tensors = some(5, 16, 300, device)
    for name in ("input", "weight", "bias"):
        tensors[f"teacher_{name}"] = tensors[f"student_{name}"]
    for t in run(linear_distillation, tensors, beta=beta):
        assert t.abs().max() < 1e-5


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("columns", [9, 300])
def test_classes_that_neither_can_have_change_nothing(device, path, beta, columns):
    """Padded vocabularies: a bias of -inf in both, where plain torch has NaN."""
    tensors = some(4, 8, columns, device)
    shorter = {k: t[:-2] if "weight" in k or "bias" in k else t for k, t in tensors.items()}
    for side in ("student", "teacher"):
        tensors[f"{side}_bias"][-2:] = float("-inf")
    loss, dx, dw, db = run(linear_distillation, tensors, beta=beta)
    expected = run(linear_distillation, shorter, beta=beta)
    for a, b in zip((loss, dx, dw[:-2], db[:-2]), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (dw[-2:] == 0).all()
    assert (db[-2:] == 0).all()


def test_a_class_that_only_the_student_rules_out_has_no_finite_forward_divergence(device, path):
    tensors = some(2, 8, 20, device)
    tensors["student_bias"][3] = float("-inf")
    loss, dx, *_ = run(linear_distillation, tensors, beta=0.0)
    assert loss == float("inf")
    assert dx.isfinite().all()
    assert linear_distillation(**tensors, beta=0.5).isfinite()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("beta", BETAS)
def test_a_logit_that_is_not_a_number_is_not_hidden(device, path, side, beta):
    tensors = some(2, 8, 20, device)
    tensors[f"{side}_bias"][5] = float("nan")
    loss, dx, *_ = run(linear_distillation, tensors, beta=beta)
    assert loss.isnan()
    assert dx.isnan().all()


def test_without_a_target_every_row_counts(device, path, chunk_rows):
    chunk_rows(3)
    tensors = some(7, 8, 30, device)
    every = run(linear_distillation, tensors)
    for a, b in zip(run(linear_distillation, tensors | {"target": None}), every, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("denominator", [7, torch.tensor(2.5, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_denominator_replaces_the_count(device, path, chunk_rows, dtype, denominator):
    chunk_rows(3)
    check(some(7, 8, 40, device, dtype, ignored=[1]), denominator=denominator)


def test_ignored_rows_count_for_nothing(device, path, chunk_rows):
    """Whatever they hold: the others have the loss and gradients that they have alone."""
    chunk_rows(3)
    tensors = some(7, 8, 40, device, ignored=[1, 4])
    tensors["student_input"][1] = float("nan")
    tensors["teacher_input"][4] = float("inf")
    kept = [0, 2, 3, 5, 6]
    alone = {k: t[kept] if "input" in k or k == "target" else t for k, t in tensors.items()}
    loss, dx, *_ = run(linear_distillation, tensors)
    expected, dx_alone, *_ = run(linear_distillation, alone)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(dx[kept], dx_alone)
    assert (dx[[1, 4]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(device, path, dtype, reduction):
    tensors = some(3, 8, 20, device, dtype, ignored=[0, 1, 2])
    upstream = torch.ones(3, device=device) if reduction == "none" else None
    loss, *gradients = run(linear_distillation, tensors, upstream, reduction=reduction)
    assert loss.isnan() if reduction == "mean" else (loss == 0).all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)
    if reduction != "none":
        loss, *gradients = run(linear_distillation, tensors, reduction=reduction, denominator=0)
        assert loss == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_another_ignore_index(device, path):
    tensors = some(4, 8, 20, device)
    tensors["target"][1] = 5
    loss, *_ = check(tensors, torch.rand(4, device=device), ignore_index=5, reduction="none")
    assert loss[1] == 0
    for ignored in (0, 1):
        every = linear_distillation(**tensors | {"target": None}, ignore_index=ignored, reduction="none")
        assert (every > 0).all()


def test_leading_dimensions_without_bias(device, path):
    tensors = some(6, 8, 30, device, ignored=[4]) | {"student_bias": None, "teacher_bias": None}
    for name in ("student_input", "teacher_input", "target"):
        tensors[name] = tensors[name].unflatten(0, (2, 3))
    loss, *_ = check(tensors, torch.rand(2, 3, device=device), reduction="none")
    assert loss.shape == (2, 3)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows(device, path, reduction):
    upstream = torch.ones(0, device=device) if reduction == "none" else None
    loss, dx, dw, db = run(linear_distillation, some(0, 8, 20, device), upstream, reduction=reduction)
    assert loss.sum() == 0
    assert dx.shape == (0, 8)
    assert (dw == 0).all()
    assert (db == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["input", "weight", "bias", "weight and bias"])
def test_frozen_tensors_get_no_gradient_and_change_no_other(device, path, chunk_rows, frozen, reduction):
    chunk_rows(3)
    tensors = some(7, 8, 40, device)
    upstream = torch.rand(7 if reduction == "none" else (), device=device)
    _, *full = run(linear_distillation, tensors, upstream, reduction=reduction)
    for name in ("input", "weight", "bias"):
        tensors[f"student_{name}"].requires_grad_(name not in frozen)
    linear_distillation(**tensors, reduction=reduction).backward(upstream)
    for name, gradient in zip(("input", "weight", "bias"), full, strict=True):
        if name in frozen:
            assert tensors[f"student_{name}"].grad is None
        else:
            torch.testing.assert_close(tensors[f"student_{name}"].grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_teacher_is_a_constant(device, path, reduction):
    tensors = {k: t.requires_grad_(t.is_floating_point()) for k, t in some(3, 8, 20, device).items()}
    linear_distillation(**tensors, reduction=reduction).sum().backward()
    assert {k for k, t in tensors.items() if t.grad is not None} == {"student_input", "student_weight", "student_bias"}


def test_no_gradient_needed_gives_the_same_loss(device, path, chunk_rows):
    chunk_rows(3)
    tensors = some(4, 8, 30, device)
    expected, *_ = run(linear_distillation, tensors)
    with torch.no_grad():
        quiet = linear_distillation(**tensors | {"student_input": tensors["student_input"].requires_grad_()})
    assert torch.equal(quiet, expected)
    assert not quiet.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_whole_logits_are_held(allocations, path, chunk_rows, reduction):
    chunk_rows(4)
    tensors = some(64, 4, 200, "cpu")
    upstream = torch.ones(64 if reduction == "none" else ())
    logits = 64 * 200 * 4
    assert max(allocations(lambda: run(naive, tensors)).sizes) >= logits
    ours = allocations(lambda: run(linear_distillation, tensors, upstream, reduction=reduction))
    assert sum(ours.sizes) > logits / 16, "the recorder sees nothing"
    assert max(ours.sizes) <= logits / 16


def test_a_gradient_that_nobody_needs_takes_no_memory(allocations, path, chunk_rows):
    chunk_rows(4)
    tensors = some(8, 32, 500, "cpu")
    size = tensors["student_weight"].numel() * 4

    def backward():
        linear_distillation(**tensors | {"student_input": tensors["student_input"].clone().requires_grad_()}).backward()

    assert size not in allocations(backward).sizes
    tensors["student_weight"].requires_grad_()
    assert size in allocations(backward).sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_through_one_graph(device, path, chunk_rows, dtype, reduction):
    """Forward's gradients are used up by the first backward; what that returned must not change either."""
    chunk_rows(3)
    tensors = some(7, 16, 60, device, dtype, ignored=[1])
    upstream = torch.rand(7 if reduction == "none" else (), device=device)

    def two(function, tensors):
        leaves = {k: t.detach().requires_grad_() for k, t in tensors.items() if k.startswith("student")}
        loss = function(**tensors | leaves, reduction=reduction)
        first = torch.autograd.grad(loss, [*leaves.values()], upstream.to(loss.dtype), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, [*leaves.values()], 3 * upstream.to(loss.dtype))
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        return *first, *second

    results = (two(linear_distillation, tensors), two(naive, tensors), two(naive, double(tensors)))
    for three in zip(*results, strict=True):
        assert_as_exact_as(*three, depth=2)


def test_second_derivative_is_refused_not_wrong(device, path):
    tensors = some(3, 8, 20, device)
    x = tensors["student_input"].requires_grad_()
    (dx,) = torch.autograd.grad(linear_distillation(**tensors).square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("accum_dtype", [None, torch.float32], ids=str)
def test_error_of_the_weights_gradient_does_not_grow_with_chunks(device, path, chunk_rows, accum_dtype):
    tensors = some(64, 16, 50, device, torch.bfloat16)
    _, _, *exact = run(naive, double(tensors))
    _, _, *own = run(naive, tensors)
    for count in (1, 8, 64) if path == "reference" else (1, 8):
        chunk_rows(64 // count)
        _, _, *actual = run(linear_distillation, tensors, accum_dtype=accum_dtype)
        for name, *three in zip(("dW", "db"), actual, own, exact, strict=True):
            assert_as_exact_as(*three, f"{name} of {count} chunks")


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_with_fp32_heads(device, path, chunk_rows, input_dtype):
    chunk_rows(4)
    tensors = some(10, 16, 70, device, ignored=[2])
    for name in ("student_input", "teacher_input"):
        tensors[name] = tensors[name].to(input_dtype)

    def autocast(function):
        def call(**arguments):
            with torch.autocast(device.type, torch.bfloat16):
                return function(**arguments)

        return call

    actual, own = run(autocast(linear_distillation), tensors), run(autocast(naive), tensors)
    exact = run(naive, double(tensors))
    assert [t.dtype for t in actual] == [torch.float32, input_dtype, torch.float32, torch.float32]
    for a, o, e in zip(actual, own, exact, strict=True):
        assert relative_error(a, e) <= 1.5 * relative_error(o, e) + 8e-4


def test_fp16_gradient_survives_a_large_denominator_until_the_loss_scale_arrives(device, path, chunk_rows):
    chunk_rows(2)
    tensors = some(3, 8, 50, device, torch.float16)
    _, dx, *_ = check(tensors, torch.tensor(2.0**24, device=device), reduction="sum", denominator=2.0**25)
    assert (dx != 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradcheck(device, beta):
    tensors = some(5, 3, 7, device, torch.float64, ignored=[1])
    names = ("student_input", "student_weight", "student_bias")
    for reduction in ("mean", "none"):

        def loss(*leaves, reduction=reduction):
            given = dict(zip(names, leaves, strict=True))
            return linear_distillation(
                **tensors | given, reduction=reduction, beta=beta, temperature=1.7, **SCALINGS["all"]
            )

        assert torch.autograd.gradcheck(loss, [tensors[name].requires_grad_() for name in names])


def test_inputs_stay_unchanged_and_the_same_bits_come_every_time(device, path, chunk_rows):
    chunk_rows(4)
    tensors = some(9, 8, 70, device)
    before = {k: t.clone() for k, t in tensors.items()}
    runs = [run(linear_distillation, tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(tensors[k], before[k]) for k in tensors)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break_on_the_cpu(monkeypatch, chunk_rows, reduction):
    monkeypatch.setattr(importlib.import_module("liger.ops.launch"), "enabled", False)
    chunk_rows(4)
    torch._dynamo.reset()
    compiled = torch.compile(linear_distillation, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):  # the second has dynamic shapes
        tensors = some(rows, 8, 30, "cpu", ignored=[0, 3])
        upstream = torch.rand(rows if reduction == "none" else ())
        options = {"reduction": reduction, "beta": 0.1, **SCALINGS["all"]}
        eager = run(linear_distillation, tensors, upstream, **options)
        for a, b in zip(run(compiled, tensors, upstream, **options), eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"student_weight": torch.empty(0)}, ValueError, r"student_weight is empty, shape \(0,\): has ZeRO-3"),
        ({"teacher_weight": torch.empty(0)}, ValueError, r"teacher_weight is empty, shape \(0,\): has ZeRO-3"),
        ({"teacher_weight": torch.ones(5, 8)}, ValueError, r"teacher_weight has shape \(5, 8\), expected \(V, 9\)"),
        ({"teacher_weight": torch.ones(6, 9)}, ValueError, "teacher_weight has 6 rows and student_weight 5"),
        ({"teacher_input": torch.ones(3, 9)}, ValueError, r"teacher_input has shape \(3, 9\), expected \(2, H\)"),
        ({"student_weight": torch.ones(5, 8).double()}, TypeError, "student_input is torch.float32 and student_weight"),
        ({"teacher_bias": torch.ones(4)}, ValueError, r"teacher_bias has shape \(4,\), expected \(5,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\), expected \(2,\)"),
        ({"target": torch.zeros(2)}, TypeError, "target must be int64 or int32"),
        ({"beta": 1.5}, ValueError, "beta must be from 0 to 1, not 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, not 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be positive and finite, not inf"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError, "temperature requires a gradient"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\), expected one number"),
        ({"student_softcap": 0.0}, ValueError, "student_softcap must be positive and finite, or None, not 0.0"),
        ({"teacher_logit_scale": float("nan")}, ValueError, "teacher_logit_scale must be finite, not nan"),
        ({"beta": torch.tensor(0.5, requires_grad=True)}, ValueError, "beta requires a gradient"),
        ({"reduction": "batchmean"}, ValueError, "reduction must be 'mean', 'sum' or 'none'"),
        ({"accum_dtype": torch.float16}, ValueError, "accum_dtype must be None or torch.float32"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {
        "student_input": torch.ones(2, 8), "student_weight": torch.ones(5, 8), "teacher_input": torch.ones(2, 9),
        "teacher_weight": torch.ones(5, 9),
    }  # fmt: skip
    with pytest.raises(error, match=f"linear_distillation: {message}"):
        linear_distillation(**arguments | changed)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", BETAS)
def test_compiles_and_never_waits_for_the_gpu(device, chunk_rows, beta):
    torch._dynamo.reset()
    chunk_rows(100)
    compiled = torch.compile(linear_distillation, fullgraph=True)
    for rows in (256, 300):
        tensors = some(rows, 32, 4096, device, torch.bfloat16, ignored=range(0, rows, 4))
        eager = run(linear_distillation, tensors, beta=beta)
        for a, b in zip(run(compiled, tensors, beta=beta), eager, strict=True):
            torch.testing.assert_close(a, b)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(linear_distillation, tensors, beta=beta)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_peak_memory(device):
    torch.use_deterministic_algorithms(False)
    rows, width, columns = 4096, 384, 65536
    tensors = some(rows, width, columns, device, torch.bfloat16)
    tensors["student_input"].requires_grad_()
    dw, logits = tensors["student_weight"].numel() * 2, rows * columns * 2

    def peak():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_distillation(**tensors).backward()
        tensors["student_input"].grad = tensors["student_weight"].grad = None
        return torch.cuda.max_memory_allocated() - before

    peak()  # cuBLAS takes its workspace
    slack = 32 * 2**20
    assert peak() <= linear_chunks.CHUNK_BYTES + slack <= logits
    tensors["student_weight"].requires_grad_()
    assert dw <= peak() <= linear_chunks.CHUNK_BYTES + dw + slack


@pytest.mark.parametrize("with_target", [True, False])
def test_the_weights_gradient_of_what_text_is_like(device, path, chunk_rows, monkeypatch, with_target):
    """Classes by Zipf's law, which the teacher knows: to a frequent class every chunk adds no small part."""
    if path == "kernel" and device.type == "cpu":
        pytest.skip("the interpreter takes too long")
    monkeypatch.setattr(linear_chunks, "FREQUENT", 128)
    chunk_rows(128)
    tensors = some(1024, 24, 8192, device)
    often = 1 / torch.arange(1, 8193, device=device).float()
    tensors["target"] = torch.multinomial(often, 1024, replacement=True) if with_target else None
    if with_target:  # the first chunk tells nothing of the others
        tensors["target"][:128] = -100
    for name in ("student_weight", "teacher_weight"):
        tensors[name] *= 0.2
    tensors["student_bias"] = often.log()
    tensors["teacher_bias"] = often.log() + 0.3 * torch.randn(8192, device=device)
    given = {name: t.bfloat16() if t is not None and t.is_floating_point() else t for name, t in tensors.items()}
    wide = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}

    def weight_gradient(function, tensors):
        weight = tensors["student_weight"].clone().requires_grad_()
        function(**{**tensors, "student_weight": weight}, beta=0.0, reduction="sum").backward()
        return weight.grad

    exact = weight_gradient(naive, wide)
    ours = relative_error(weight_gradient(linear_distillation, given), exact)
    own = relative_error(weight_gradient(naive, given), exact)
    monkeypatch.setattr(linear_chunks, "FREQUENT", 0)
    in_bf16 = relative_error(weight_gradient(linear_distillation, given), exact)
    assert ours < 1.5 * own, (ours, own, in_bf16)
    assert ours < 0.8 * in_bf16, (ours, own, in_bf16)
