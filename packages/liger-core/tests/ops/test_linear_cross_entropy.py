"""linear_cross_entropy against fp64, through the kernels and through the reference, in several chunks.

Over 300 lines: an op has one file of tests.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from liger.ops import linear_chunks, linear_cross_entropy
from liger.ops.loss_rows import Options, fill_rows
from liger.testing import assert_as_exact_as
from liger.testing.error_rule import relative_error
from loss_cases import DTYPES, OPTIONS, cross_entropy_in_torch, upstream_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")
module = importlib.import_module("liger.ops.linear_cross_entropy")


def naive(x, weight, target, *, linear_bias=None, accum_dtype=None, **options):
    """What a model would write with torch's own functions."""
    return cross_entropy_in_torch(F.linear(x, weight, linear_bias), target, **options)


def some(rows, width, columns, device, dtype=torch.float32, ignored=()):
    """x, weight, bias and target, with logits of a few units."""
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = (2 * torch.randn(columns, width, device=device) / width**0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype)
    target = torch.randint(0, columns, (rows,), device=device)
    target[list(ignored)] = -100
    return x, weight, bias, target


def run(function, x, weight, bias, target, upstream=None, **options):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    loss = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    upstream = None if upstream is None else upstream.to(loss.dtype)
    return loss, *torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream)


def check(x, weight, bias, target, upstream=None, **options):
    """Loss and gradients of linear_cross_entropy obey the error rule; returns them."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    actual = run(linear_cross_entropy, x, weight, bias, target, upstream, **options)
    own = run(naive, x, weight, bias, target, upstream, **options)
    exact = run(naive, *wide, target, upstream, **options)
    for name, *three in zip(("loss", "dx", "dW", "db"), actual, own, exact, strict=bias is not None):
        assert_as_exact_as(*three, name)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 127, 1000, 1091])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_fp64(device, path, chunk_rows, dtype, columns, reduction):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(3)
    tensors = some(8, 24, columns, device, dtype, ignored=[2, 7])
    check(*tensors, upstream_of(reduction, 8, device), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_classes_match_fp64(device, path, chunk_rows, dtype):
    chunk_rows(2)
    check(*some(3, 16, 32001, device, dtype))


@pytest.mark.parametrize("columns", [152065, 262143])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"softcap": 30.0, "label_smoothing": 0.1}], ids=str)
def test_the_largest_vocabularies_which_no_tile_divides(device, path, columns, options):
    check(*some(2, 4, columns, device, torch.bfloat16), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_gradient_of_the_true_class_near_certainty(device, path, p, reduction):
    """p − 1 must be taken before p is rounded to bf16: db of the label is that and nothing else."""
    columns = 1001
    bias = torch.zeros(columns, device=device)
    bias[5] = torch.tensor(p * (columns - 1) / (1 - p)).log()
    x, weight = torch.zeros(1, 8, device=device), torch.zeros(columns, 8, device=device)
    tensors = [t.bfloat16() for t in (x, weight, bias)]
    target = torch.tensor([5], device=device)
    upstream = torch.ones(1 if reduction == "none" else (), device=device)
    *_, db = run(linear_cross_entropy, *tensors, target, upstream, reduction=reduction)
    *_, exact = run(naive, *(t.double() for t in tensors), target, upstream, reduction=reduction)
    assert (db[5] / exact[5] - 1).abs() < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_logits_but_one_minus_infinity(device, path, dtype, reduction):
    x, weight, bias, _ = some(2, 8, 9001, device, dtype)
    bias[:3] = bias[4:] = float("-inf")
    upstream = torch.ones(2 if reduction == "none" else (), device=device)
    target = torch.tensor([3, 3], device=device)
    loss, *gradients = run(linear_cross_entropy, x, weight, bias, target, upstream, reduction=reduction)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("width", [8, 512])
def test_many_rows_of_an_odd_vocabulary_match_fp64(device, path, dtype, with_bias, width):
    """From 128 rows on, columns beside whole lines are multiplied apart."""
    x, weight, bias, target = some(131, width, 1091, device, dtype, ignored=[5])
    upstream = upstream_of("none", 131, device)
    check(x, weight, bias if with_bias else None, target, upstream, reduction="none")


@pytest.mark.parametrize("columns", [1091, 9001])
def test_memory_beside_the_rows_counts_for_nothing(device, path, columns):
    options = Options(ignore_index=-100, label_smoothing=0.1, z_loss=1e-3, softcap=3.0, logit_scale=0.5)
    alone = torch.randn(3, columns, device=device).bfloat16()
    padded = alone.new_full((3, -(-columns // 64) * 64), float("nan"))
    padded[:, :columns] = alone
    target = torch.tensor([0, columns - 1, -100], device=device)
    results = []
    for logits, width in ((alone, None), (padded[:, :columns], padded.shape[1])):
        loss, lse = torch.empty(3, device=device), torch.empty(3, 2, device=device)
        fill_rows(logits, target, options, loss, lse, logits, padded=width)
        results.append((loss, lse, logits))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_match_fp64(device, path, chunk_rows, dtype, reduction, options):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(4)
    tensors = some(10, 16, 300, device, dtype, ignored=[0])
    check(*tensors, upstream_of(reduction, 10, device), reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_few_logits_as_a_whole_match_fp64(device, path, monkeypatch, reduction, options):
    monkeypatch.setattr(module, "_are_few", lambda *_: True)
    upstream = upstream_of(reduction, 12, device)
    check(*some(12, 8, 50, device, torch.bfloat16, ignored=[3]), upstream, reduction=reduction, **options)
    if reduction == "sum":
        check(*some(12, 8, 50, device, ignored=range(12)), reduction=reduction, denominator=4, **options)


@pytest.mark.gpu
def test_only_few_logits_exist_as_a_whole(device, monkeypatch):
    tensors = [t.requires_grad_() if t.is_floating_point() else t for t in some(12, 8, 50, device)]
    x, weight, bias, target = tensors

    def function():
        return type(linear_cross_entropy(x, weight, target, linear_bias=bias).grad_fn).__name__

    assert function() == "liger::linear_cross_entropyBackward"
    monkeypatch.setattr(module, "FEW_LOGITS", 12 * 50)
    assert function() == "liger::cross_entropyBackward"
    monkeypatch.setattr(module, "FEW_LOGITS", 12 * 50 - 1)
    assert function() == "liger::linear_cross_entropyBackward"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("denominator", [7, torch.tensor(2.5, dtype=torch.float64)], ids=str)
def test_denominator_replaces_the_count(device, path, chunk_rows, dtype, reduction, denominator):
    chunk_rows(3)
    check(*some(7, 8, 40, device, dtype, ignored=[1]), reduction=reduction, denominator=denominator)


def test_leading_dimensions_without_bias(device, path):
    x, weight, _, target = some(6, 8, 30, device, ignored=[4])
    check(x.view(2, 3, 8), weight, None, target.view(2, 3), torch.rand(2, 3, device=device), reduction="none")


def test_strided_input_and_weight(device, path):
    x, weight, bias, target = some(6, 8, 30, device)
    check(x.t().contiguous().t(), weight.t().contiguous().t(), bias, target.repeat_interleave(2)[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("denominator", [4, 0])
def test_all_labels_ignored_with_a_denominator_is_zero(device, path, dtype, denominator):
    tensors = some(3, 8, 20, device, dtype, ignored=[0, 1, 2])
    loss, *gradients = run(linear_cross_entropy, *tensors, reduction="sum", denominator=denominator)
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_labels_ignored_in_the_mean_is_as_in_torch(device, path, dtype):
    loss, *gradients = run(linear_cross_entropy, *some(3, 8, 20, device, dtype, ignored=[0, 1, 2]))
    assert loss.isnan()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows(device, path, reduction):
    x, weight, bias, target = some(0, 8, 20, device)
    upstream = target.double() if reduction == "none" else None
    loss, dx, dw, db = run(linear_cross_entropy, x, weight, bias, target, upstream, reduction=reduction)
    assert loss.sum() == 0
    assert dx.shape == (0, 8)
    assert torch.equal(dw, torch.zeros_like(weight))
    assert torch.equal(db, torch.zeros_like(bias))


def test_loss_times_a_random_mask(device, path, chunk_rows):
    """An upstream gradient per row reaches dx, dW and db, zeros and ignored rows included."""
    chunk_rows(5)
    x, weight, bias, target = some(16, 12, 50, device, ignored=[3, 7])
    mask = torch.randint(0, 2, (16,), device=device)

    def masked(function):
        return lambda *args, **options: (function(*args, reduction="none", **options) * mask).sum() / mask.sum()

    actual = run(masked(linear_cross_entropy), x, weight, bias, target)
    exact = run(masked(naive), x.double(), weight.double(), bias.double(), target)
    own = run(masked(naive), x, weight, bias, target)
    for three in zip(actual, own, exact, strict=True):
        assert_as_exact_as(*three)


@pytest.mark.parametrize("how", ["expanded", "strided"])
def test_upstream_gradient_of_any_stride(device, path, chunk_rows, how):
    chunk_rows(3)
    x, weight, bias, target = some(8, 12, 50, device, ignored=[3])
    one = torch.full((1,), 0.5, device=device).expand(8)
    upstream = one if how == "expanded" else torch.rand(8, 3, device=device)[:, 1]
    check(x, weight, bias, target, upstream, reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_needed_gives_the_right_loss(device, path, chunk_rows, reduction):
    chunk_rows(3)
    x, weight, _, target = some(4, 8, 3, device)
    expected = naive(x, weight, target, reduction=reduction)
    torch.testing.assert_close(linear_cross_entropy(x, weight, target, reduction=reduction), expected)
    with torch.no_grad():
        quiet = linear_cross_entropy(x.clone().requires_grad_(), weight, target, reduction=reduction)
    torch.testing.assert_close(quiet, expected)
    assert not quiet.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias"])
def test_frozen_tensors_get_no_gradient_and_change_no_other(device, path, chunk_rows, frozen, reduction):
    chunk_rows(3)
    tensors = dict(zip(("x", "weight", "bias", "target"), some(7, 8, 40, device), strict=True))
    upstream = torch.rand(7 if reduction == "none" else (), device=device)
    _, *full = run(linear_cross_entropy, *tensors.values(), upstream, reduction=reduction)
    for name in ("x", "weight", "bias"):
        tensors[name].requires_grad_(name not in frozen)
    loss = linear_cross_entropy(
        tensors["x"], tensors["weight"], tensors["target"], linear_bias=tensors["bias"], reduction=reduction
    )
    loss.backward(upstream)
    for name, gradient in zip(("x", "weight", "bias"), full, strict=True):
        if name in frozen:
            assert tensors[name].grad is None
        else:
            torch.testing.assert_close(tensors[name].grad, gradient)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_whole_logits_are_never_held(allocations, path, chunk_rows, reduction):
    chunk_rows(4)
    x, weight, bias, target = some(64, 4, 200, "cpu")
    upstream = torch.ones(64 if reduction == "none" else ())
    logits = 64 * 200 * 4
    assert max(allocations(lambda: run(naive, x, weight, bias, target)).sizes) >= logits
    ours = allocations(lambda: run(linear_cross_entropy, x, weight, bias, target, upstream, reduction=reduction))
    assert sum(ours.sizes) > logits / 16, "the recorder sees nothing"
    assert max(ours.sizes) <= logits / 16


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_that_nobody_needs_take_no_memory(allocations, path, chunk_rows, reduction):
    chunk_rows(4)
    x, weight, bias, target = some(8, 32, 500, "cpu")
    size = weight.numel() * 4
    upstream = torch.ones(8 if reduction == "none" else ())

    def backward():
        loss = linear_cross_entropy(x.clone().requires_grad_(), weight, target, linear_bias=bias, reduction=reduction)
        loss.backward(upstream)

    assert size not in allocations(backward).sizes
    weight.requires_grad_()
    assert size in allocations(backward).sizes
    with torch.no_grad():
        assert max(allocations(lambda: linear_cross_entropy(x, weight, target)).sizes) < size


def test_the_weights_gradient_is_allocated_once_and_handed_over(allocations, device, path):
    """1 GB at a real size: no copy by the scaling in backward, none by AccumulateGrad."""
    if path == "reference":
        pytest.skip("scales out of place")
    x, weight, _, target = some(8, 32, 500, device)
    weight.requires_grad_()
    made = allocations(lambda: (2 * linear_cross_entropy(x, weight, target)).backward())
    assert made.sizes.count(weight.numel() * 4) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_through_one_graph(device, path, chunk_rows, dtype, reduction):
    """Forward's gradients are used up by the first backward; what that returned must not change either."""
    chunk_rows(3)
    x, weight, bias, target = some(7, 16, 60, device, dtype, ignored=[1])
    upstream = torch.rand(7 if reduction == "none" else (), device=device)

    def two(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
        loss = function(*leaves[:2], target, linear_bias=leaves[2], reduction=reduction)
        first = torch.autograd.grad(loss, leaves, upstream.to(loss.dtype), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, leaves, 3 * upstream.to(loss.dtype))
        assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
        return *first, *second

    results = zip(two(linear_cross_entropy, dtype), two(naive, dtype), two(naive, torch.float64), strict=True)
    for three in results:
        assert_as_exact_as(*three, depth=2)


def test_two_backwards_accumulate_into_grad(device, path):
    x, weight, _, target = some(5, 8, 30, device)
    weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target)
    loss.backward(retain_graph=True)
    once = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * once)


@pytest.mark.parametrize("leading", [(), (5,)])
def test_second_backward_after_the_first_ones_gradient_was_changed(device, path, leading):
    x = torch.randn(*leading, 3, 6, device=device, requires_grad=True)
    target = torch.zeros(*leading, 3, dtype=torch.int64, device=device)
    loss = linear_cross_entropy(x, torch.randn(4, 6, device=device), target)
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    x.grad.zero_()
    loss.backward()
    torch.testing.assert_close(x.grad, once)


def test_a_gradient_penalty_is_refused_not_left_out(device, path):
    x, weight, bias, target = some(3, 8, 20, device)
    loss = linear_cross_entropy(x.requires_grad_(), weight, target, linear_bias=bias)
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (loss + dx.square().sum()).backward()


@pytest.mark.parametrize("accum_dtype", [None, torch.float32], ids=str)
@pytest.mark.parametrize("classes", [50, 300])
def test_error_of_the_weights_gradient_does_not_grow_with_chunks(device, path, chunk_rows, accum_dtype, classes):
    """In bf16 up to 2 chunks, or to 8 where the classes are many; in fp32 beyond, and where fp32 is asked for."""
    x, weight, bias, target = some(64, 16, classes, device, torch.bfloat16)
    _, _, *exact = run(naive, x.double(), weight.double(), bias.double(), target)
    _, _, *own = run(naive, x, weight, bias, target)
    for count in (1, 2, 3, 8, 9, 64):
        chunk_rows(-(-64 // count))
        _, _, *actual = run(linear_cross_entropy, x, weight, bias, target, accum_dtype=accum_dtype)
        for name, *three in zip(("dW", "db"), actual, own, exact, strict=True):
            assert_as_exact_as(*three, f"{name} of {count} chunks")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_with_an_fp32_head(device, path, chunk_rows, with_bias, reduction, input_dtype):
    chunk_rows(4)
    x, weight, bias, target = some(10, 16, 70, device, ignored=[2])
    x, bias = x.to(input_dtype), bias if with_bias else None
    upstream = torch.rand(10 if reduction == "none" else (), device=device)

    def autocast(function):
        def call(*args, **options):
            with torch.autocast(device.type, torch.bfloat16):
                return function(*args, **options)

        return call

    actual = run(autocast(linear_cross_entropy), x, weight, bias, target, upstream, reduction=reduction)
    own = run(autocast(naive), x, weight, bias, target, upstream, reduction=reduction)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    exact = run(naive, *wide, target, upstream, reduction=reduction)
    assert [t.dtype for t in actual] == [torch.float32, input_dtype, torch.float32, torch.float32][: len(actual)]
    for a, o, e in zip(actual, own, exact, strict=True):
        assert relative_error(a, e) <= 1.5 * relative_error(o, e) + 8e-4


def test_autocast_keeps_the_sum_of_the_chunks_in_the_weights_dtype(device, path, chunk_rows):
    """A bf16 sum over the chunks would round what fp32 master weights are there to keep."""
    chunk_rows(8)
    x, weight, _, target = some(64, 16, 30, device)
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        (one,) = torch.autograd.grad(linear_cross_entropy(x[:8], weight, target[:8], reduction="sum"), weight)
        (rest,) = torch.autograd.grad(linear_cross_entropy(x[8:], weight, target[8:], reduction="sum"), weight)
        (both,) = torch.autograd.grad(linear_cross_entropy(x, weight, target, reduction="sum"), weight)
    torch.testing.assert_close(both, one + rest, rtol=1e-6, atol=1e-6)


def test_fp16_gradient_survives_a_large_denominator_until_the_loss_scale_arrives(device, path, chunk_rows):
    chunk_rows(2)
    tensors = some(3, 8, 50, device, torch.float16)
    upstream = torch.tensor(2.0**24, device=device)
    _, dx, *_ = check(*tensors, upstream, reduction="sum", denominator=2.0**25)
    assert (dx != 0).all()


def test_gradcheck(device):
    x, weight, bias, target = some(5, 3, 7, device, torch.float64, ignored=[1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for reduction in ("mean", "none"):

        def loss(x, weight, bias, reduction=reduction):
            return linear_cross_entropy(x, weight, target, linear_bias=bias, reduction=reduction, **OPTIONS["all"])

        assert torch.autograd.gradcheck(loss, leaves)


def test_softmax_of_a_producer_stays_unchanged(device, path):
    x, weight, bias, target = some(4, 8, 30, device)
    weight.requires_grad_()
    leaf = x.requires_grad_()
    produced = leaf.softmax(-1)
    before = [t.detach().clone() for t in (produced, weight, bias, target)]
    loss = linear_cross_entropy(produced, weight, target, linear_bias=bias)
    loss = loss + linear_cross_entropy(produced, weight, target, linear_bias=bias, reduction="sum")
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip((produced, weight, bias, target), before, strict=True))


def test_same_bits_every_time(device, path, chunk_rows):
    chunk_rows(4)
    tensors = some(9, 8, 70, device)
    runs = [run(linear_cross_entropy, *tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_weights_gradient_of_what_text_is_like(device, path, chunk_rows, monkeypatch):
    """Targets by Zipf's law, which the bias knows: to a frequent class every chunk adds no small part."""
    if path == "kernel" and device.type == "cpu":
        pytest.skip("the interpreter takes too long")
    monkeypatch.setattr(linear_chunks, "FREQUENT", 256)
    chunk_rows(256)
    rows, classes, width = 2048, 16384, 64
    often = 1 / torch.arange(1, classes + 1, device=device)
    target = torch.multinomial(often, rows, replacement=True)
    weight = 0.3 * torch.randn(classes, width, device=device)
    tensors = (*(t.bfloat16() for t in (torch.randn(rows, width, device=device), weight, often.log())), target)
    exact = run(naive, *(t.double() for t in tensors[:3]), target)[2]

    def error(function):
        return relative_error(run(function, *tensors)[2], exact)

    ours, own = error(linear_cross_entropy), error(naive)
    monkeypatch.setattr(linear_chunks, "FREQUENT", 0)
    assert ours < 1.5 * own < 0.95 * error(linear_cross_entropy)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break_on_the_cpu(monkeypatch, chunk_rows, reduction):
    monkeypatch.setattr(importlib.import_module("liger.ops.launch"), "enabled", False)
    chunk_rows(4)
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):  # the second has dynamic shapes
        tensors = some(rows, 8, 30, "cpu", ignored=[0, 3])
        upstream = torch.rand(rows if reduction == "none" else ())
        eager = run(linear_cross_entropy, *tensors, upstream, reduction=reduction)
        for a, b in zip(run(compiled, *tensors, upstream, reduction=reduction), eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("label", [5, -1])
def test_label_out_of_range_is_named_on_the_cpu(path, label):
    target = torch.tensor([0, label, -100])
    with pytest.raises(IndexError, match=f"label {label} is out of range: expected 0 to 4, or -100"):
        linear_cross_entropy(torch.randn(3, 8), torch.randn(5, 8), target)


class DTensorLike(torch.Tensor):
    device_mesh = None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"linear_weight": torch.empty(0)}, ValueError, r"linear_weight is empty, shape \(0,\): has ZeRO-3"),
        ({"linear_weight": torch.ones(5, 8).as_subclass(DTensorLike)}, ValueError, "linear_weight is a DTensor"),
        ({"linear_weight": torch.ones(5, 7)}, ValueError, r"linear_weight has shape \(5, 7\), expected \(V, 8\)"),
        (
            {"linear_weight": torch.ones(5, 8).double()},
            TypeError,
            "input is torch.float32 and linear_weight is torch.f",
        ),
        ({"linear_bias": torch.ones(5).half()}, TypeError, "input is torch.float32 and linear_bias is"),
        ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias has shape \(4,\), expected \(5,\)"),
        ({"linear_weight": torch.ones(5, 8, device="meta")}, ValueError, "linear_weight is on meta"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\), expected \(2,\)"),
        ({"accum_dtype": torch.float16}, ValueError, "accum_dtype must be None or torch.float32"),
        ({"reduction": "none", "denominator": 3}, ValueError, "reduction is 'none'"),
        *(
            ({name: torch.tensor(0.5, requires_grad=True)}, ValueError, f"{name} requires a gradient")
            for name in ("logit_scale", "softcap", "z_loss", "label_smoothing", "denominator")
        ),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {"linear_weight": torch.ones(5, 8), "target": torch.zeros(2, dtype=torch.int64)} | changed
    with pytest.raises(error, match=message):
        linear_cross_entropy(torch.ones(2, 8), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_and_captures_also_with_ignored_rows(device, chunk_rows, reduction):
    """Eager, compiled and replayed from a CUDA graph: the same numbers."""
    torch._dynamo.reset()
    chunk_rows(100)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for rows in (256, 300):
        tensors = some(rows, 32, 4096, device, torch.bfloat16, ignored=range(0, rows, 4))
        upstream = torch.rand(rows if reduction == "none" else (), device=device)
        eager = run(linear_cross_entropy, *tensors, upstream, reduction=reduction)
        for a, b in zip(run(compiled, *tensors, upstream, reduction=reduction), eager, strict=True):
            torch.testing.assert_close(a, b)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(linear_cross_entropy, *tensors, upstream, reduction=reduction)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(linear_cross_entropy, *tensors, upstream, reduction=reduction)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, eager, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_host_never_waits_for_the_gpu(device, chunk_rows, dtype):
    chunk_rows(16)
    tensors = some(40, 32, 500, device, dtype, ignored=[3])
    cases = [{}, {"reduction": "none"}, {"reduction": "sum", "denominator": torch.tensor(5, device=device)}]
    upstream = [torch.ones(40 if case.get("reduction") == "none" else (), device=device) for case in cases]
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")  # compile first
        try:
            for case, g in zip(cases, upstream, strict=True):
                run(linear_cross_entropy, *tensors, g, **case)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_chunk_past_two_to_the_31_elements(device, chunk_rows):
    torch.use_deterministic_algorithms(False)  # poisoning gigabytes says nothing here
    columns = 128256
    rows = 2**31 // columns + 3
    chunk_rows(rows)
    x, weight, _, target = some(rows, 16, columns, device, torch.bfloat16)
    _, whole, _ = run(linear_cross_entropy, x, weight, None, target, reduction="sum")
    _, alone, _ = run(linear_cross_entropy, x[-3:], weight, None, target[-3:].clone(), reduction="sum")
    torch.testing.assert_close(whole[-3:], alone)


@pytest.mark.gpu
def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = some(4, 16, 300, torch.device("cuda:0"))
    first = run(linear_cross_entropy, *tensors)
    second = run(linear_cross_entropy, *(t.to("cuda:1") for t in tensors))
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_peak_memory(device):
    torch.use_deterministic_algorithms(False)
    rows, width, columns = 4096, 512, 65536
    x, weight, _, target = some(rows, width, columns, device, torch.bfloat16)
    x.requires_grad_()
    dw, logits = weight.numel() * 2, rows * columns * 2
    chunk = max(stop - start for start, stop in linear_chunks.chunks(rows, columns, 2, dw)) * columns * 2
    assert chunk <= logits / 2

    def peak():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(x, weight, target).backward()
        x.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    peak()  # cuBLAS takes its workspace
    slack = 32 * 2**20
    frozen = peak()
    assert frozen <= chunk + slack
    weight.requires_grad_()
    assert dw <= peak() <= chunk + dw + slack
