"""linear_log_prob against fp64, through the kernels and through the reference, in several chunks.

Over 300 lines: an op has one file of tests.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from liger.ops import launch, linear_chunks, linear_log_prob, linear_slices
from liger.testing import assert_as_exact_as
from liger.testing.error_rule import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "negative scale": {"logit_scale": -0.7},
    "all": {"temperature": 1.7, "softcap": 2.0, "logit_scale": 1.5},
}
USED = {"both": (True, True), "log_prob": (True, False), "entropy": (False, True)}


def naive(x, weight, target, *, linear_bias=None, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100):
    """What a trainer would write with torch's own functions: the linear layer, logits.float(), everything in that."""
    logits = F.linear(x, weight, linear_bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    log_p = (z / temperature).log_softmax(-1)
    counts = target != ignore_index
    label = target.long().clamp(min=0)[..., None]
    log_prob = log_p.gather(-1, label)[..., 0] * counts
    entropy = torch.special.entr(log_p.exp()).sum(-1) * counts
    return log_prob, entropy, (z.argmax(-1) == label[..., 0]) & counts


def some(rows, width, columns, device, dtype=torch.float32, ignored=()):
    """x, weight, bias and target, with logits of a few units; every other target is the most probable class."""
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = (2 * torch.randn(columns, width, device=device) / width**0.5).to(dtype)
    bias = torch.randn(columns, device=device).to(dtype)
    target = torch.randint(0, columns, (rows,), device=device)
    target[::2] = F.linear(x, weight, bias).argmax(-1)[::2]
    target[list(ignored)] = -100
    return x, weight, bias, target


def run(function, x, weight, bias, target, used=(True, True), **options):
    """The outputs, and the gradients for random upstream gradients of those that are used."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    outputs = function(leaves[0], leaves[1], target, linear_bias=leaves[2], **options)
    chance = torch.Generator().manual_seed(1)
    upstream = [torch.randn(target.shape, generator=chance).to(y) for y in outputs[:2]]
    roots, gradients = zip(
        *((y, g) for y, g, is_used in zip(outputs, upstream, used, strict=False) if is_used), strict=True
    )
    return *outputs, *torch.autograd.grad(roots, [t for t in leaves if t is not None], gradients)


def check(x, weight, bias, target, **options):
    """Outputs and gradients of linear_log_prob obey the error rule; returns them."""
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    actual = run(linear_log_prob, x, weight, bias, target, **options)
    own = run(naive, x, weight, bias, target, **options)
    exact = run(naive, *wide, target, **options)
    for name, a, o, e in zip(("log_prob", "entropy", "is_top1", "dx", "dW", "db"), actual, own, exact, strict=False):
        if name == "is_top1":
            assert torch.equal(a, o)
        else:
            # Of a few numbers, how far they are off is luck: torch may have more of it than the rule's floor has room.
            assert_as_exact_as(a, o, e, name, depth=16 if e.numel() < 16 else 1)
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 127, 1000])
def test_matches_fp64(device, path, chunk_rows, dtype, columns):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(3)
    log_prob, entropy, is_top1, *_ = check(*some(8, 24, columns, device, dtype, ignored=[2, 7]))
    assert (log_prob <= 0).all()
    assert (entropy >= 0).all()
    assert is_top1[::2].sum() >= 3
    assert not is_top1[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [32001, 152065])
def test_many_classes_match_fp64(device, path, chunk_rows, dtype, columns):
    if path == "kernel" and columns > 32001 and device.type == "cpu":
        pytest.skip("the interpreter takes too long")
    chunk_rows(2)
    check(*some(3, 16, columns, device, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_match_fp64(device, path, chunk_rows, dtype, options):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    chunk_rows(4)
    check(*some(10, 16, 300, device, dtype, ignored=[0]), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("used", USED.values(), ids=USED)
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_each_output_alone_has_its_own_gradient(device, path, chunk_rows, dtype, used, options):
    chunk_rows(4)
    check(*some(6, 16, 300, device, dtype, ignored=[1]), used=used, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_near_certainty_matches_fp64(device, path, dtype):
    """p of the target from 0.5 to 1 − 1e-9, of logits that are large themselves."""
    margin = torch.linspace(0, 20, 21, device=device)[:, None].to(dtype)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], device=device, dtype=dtype)
    log_prob, *_ = check(margin, weight, None, torch.zeros(21, dtype=torch.int64, device=device))
    assert (log_prob <= 0).all()


@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_near_certainty_logits_that_backward_rounds_otherwise_do_not_count(device, path, chunk_rows, monkeypatch, used):
    """Backward's products have other shapes than forward's: 1 − p of the target must not be their rounding."""
    weight = torch.randn(300, 96, device=device) / 96**0.5
    target = torch.randint(300, (12,), device=device)
    chunk_rows(1)
    monkeypatch.setattr(linear_slices, "grid", lambda rows, *_: ([(0, rows)], [(0, 64), (64, 300)]))
    check(20 * weight[target], weight, None, target, used=used)


def test_softcap_of_padded_lanes_is_not_summed(device, path):
    """All logits −3 under a softcap of 1: a padded lane, capped to −1 at the least, would weigh as much as a class."""
    columns = 1001
    x, weight = torch.full((2, 1), -3.0, device=device), torch.ones(columns, 1, device=device)
    log_prob, entropy, _ = linear_log_prob(x, weight, torch.tensor([0, 1000], device=device), softcap=1.0)
    exact = torch.full((2,), columns, device=device).log()
    torch.testing.assert_close(log_prob, -exact, rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy, exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min], ids=str)
@pytest.mark.parametrize("columns", [5, 300])
def test_all_logits_but_one_at_minus_infinity(device, path, lowest, columns):
    x, weight = torch.randn(2, 4, device=device), torch.randn(columns, 4, device=device)
    bias = torch.full((columns,), lowest, device=device)
    bias[3] = 1.0
    target = torch.full((2,), 3, device=device)
    log_prob, entropy, is_top1, *gradients = run(linear_log_prob, x, weight, bias, target)
    assert torch.equal(log_prob, torch.zeros_like(log_prob))
    assert torch.equal(entropy, torch.zeros_like(entropy))
    assert is_top1.all()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_a_target_at_minus_infinity(device, path):
    x, weight = torch.randn(2, 4, device=device), torch.randn(9, 4, device=device)
    bias = torch.zeros(9, device=device)
    bias[2] = float("-inf")
    log_prob, entropy, is_top1 = linear_log_prob(x, weight, torch.full((2,), 2, device=device), linear_bias=bias)
    assert (log_prob == float("-inf")).all()
    assert entropy.isfinite().all()
    assert not is_top1.any()


@pytest.mark.parametrize("broken", [float("nan"), float("inf")], ids=str)
def test_a_logit_that_is_not_a_number_is_not_hidden(device, path, broken):
    x, weight = torch.randn(2, 4, device=device), torch.randn(9, 4, device=device)
    bias = torch.zeros(9, device=device)
    bias[5] = broken
    log_prob, entropy, _, dx, *_ = run(linear_log_prob, x, weight, bias, torch.tensor([1, 2], device=device))
    assert log_prob.isnan().all() or (broken > 0 and (log_prob == float("-inf")).all())
    assert entropy.isnan().all()
    assert dx.isnan().all()


def test_of_equal_logits_the_first_is_the_argmax(device, path):
    x = torch.ones(4, 1, device=device)
    weight = torch.tensor([[0.0], [2.0], [1.0], [2.0], [2.0]], device=device)
    target = torch.tensor([1, 3, 4, 0], device=device)
    assert linear_log_prob(x, weight, target).is_top1.tolist() == [True, False, False, False]
    assert linear_log_prob(x, -weight, target, logit_scale=-1.0).is_top1.tolist() == [True, False, False, False]


def test_leading_dimensions_without_bias(device, path):
    x, weight, _, target = some(6, 8, 30, device, ignored=[4])
    check(x.view(2, 3, 8), weight, None, target.view(2, 3))


def test_strided_input_and_weight(device, path):
    x, weight, bias, target = some(6, 8, 30, device)
    check(x.t().contiguous().t(), weight.t().contiguous().t(), bias, target.repeat_interleave(2)[::2])


def test_upstream_gradients_of_any_stride(device, path, chunk_rows):
    chunk_rows(2)
    x, weight, _, target = some(5, 8, 30, device)
    x.requires_grad_()
    outputs = linear_log_prob(x, weight, target)[:2]
    scalars = [torch.tensor(0.3, device=device), torch.tensor(-0.7, device=device)]
    expanded = torch.autograd.grad(outputs, x, [s.expand(5) for s in scalars], retain_graph=True)
    whole = torch.autograd.grad(outputs, x, [s.repeat(5) for s in scalars], retain_graph=True)
    strided = torch.autograd.grad(outputs, x, [s.repeat(10)[::2] for s in scalars])
    assert torch.equal(expanded[0], whole[0])
    assert torch.equal(strided[0], whole[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_targets_ignored(device, path, dtype):
    log_prob, entropy, is_top1, *gradients = run(linear_log_prob, *some(3, 8, 20, device, dtype, ignored=[0, 1, 2]))
    for t in (log_prob, entropy, is_top1, *gradients):
        assert torch.equal(t, torch.zeros_like(t))


def test_another_ignore_index(device, path):
    x, weight, bias, target = some(4, 8, 20, device)
    target[1] = 5
    log_prob, *_ = check(x, weight, bias, target, ignore_index=5)
    assert log_prob[1] == 0


def test_no_rows(device, path):
    log_prob, entropy, is_top1, dx, dw, db = run(linear_log_prob, *some(0, 8, 20, device))
    assert log_prob.shape == entropy.shape == is_top1.shape == (0,)
    assert dx.shape == (0, 8)
    assert torch.equal(dw, torch.zeros_like(dw))
    assert torch.equal(db, torch.zeros_like(db))


def test_no_gradient_needed_gives_the_same_outputs(device, path, chunk_rows):
    chunk_rows(3)
    x, weight, _, target = some(4, 8, 3, device)
    expected = linear_log_prob(x.clone().requires_grad_(), weight, target)
    with torch.no_grad():
        quiet = linear_log_prob(x.clone().requires_grad_(), weight, target)
    assert all(torch.equal(a, b) for a, b in zip(quiet, expected, strict=True))
    assert not any(t.requires_grad for t in quiet)
    assert expected.log_prob.requires_grad
    assert expected.entropy.requires_grad
    assert not expected.is_top1.requires_grad


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "weight and bias"])
def test_frozen_tensors_get_no_gradient_and_change_no_other(device, path, chunk_rows, frozen):
    chunk_rows(3)
    tensors = dict(zip(("x", "weight", "bias", "target"), some(7, 8, 40, device), strict=True))
    *_, dx, dw, db = run(linear_log_prob, *tensors.values(), used=(True, False))
    chance = torch.Generator().manual_seed(1)
    upstream = torch.randn(7, generator=chance).to(device)
    for name in ("x", "weight", "bias"):
        tensors[name].requires_grad_(name not in frozen)
    out = linear_log_prob(tensors["x"], tensors["weight"], tensors["target"], linear_bias=tensors["bias"])
    out.log_prob.backward(upstream)
    for name, gradient in (("x", dx), ("weight", dw), ("bias", db)):
        if name in frozen:
            assert tensors[name].grad is None
        else:
            torch.testing.assert_close(tensors[name].grad, gradient)


def test_whole_logits_are_never_held(allocations, path, chunk_rows):
    chunk_rows(4)
    tensors = some(64, 4, 200, "cpu")
    logits = 64 * 200 * 4
    assert max(allocations(lambda: run(naive, *tensors)).sizes) >= logits
    ours = allocations(lambda: run(linear_log_prob, *tensors))
    assert sum(ours.sizes) > logits / 16, "the recorder sees nothing"
    assert max(ours.sizes) <= logits / 16


def test_gradients_that_nobody_needs_take_no_memory(allocations, path, chunk_rows):
    chunk_rows(4)
    x, weight, bias, target = some(8, 32, 500, "cpu")
    size = weight.numel() * 4

    def backward():
        linear_log_prob(x.clone().requires_grad_(), weight, target, linear_bias=bias).log_prob.sum().backward()

    assert size not in allocations(backward).sizes
    weight.requires_grad_()
    assert allocations(backward).sizes.count(size) == 1


def test_the_entropys_gradient_is_left_out_where_nobody_uses_it(path, monkeypatch):
    module = importlib.import_module("liger.ops.linear_log_prob")  # the package has a function of this name
    seen = []
    original = module.differentiate_rows

    def recorded(*args):
        seen.append([g is not None for g in args[6:8]])
        original(*args)

    monkeypatch.setattr(module, "differentiate_rows", recorded)
    for used in USED.values():
        run(linear_log_prob, *some(3, 8, 20, "cpu"), used=used)
    assert seen == [list(used) for used in USED.values()]


@pytest.mark.parametrize("first", [True, False], ids=["kernels, then torch", "torch, then kernels"])
def test_backward_may_take_another_path_than_forward(device, monkeypatch, first):
    """As where another thread, or the caller of backward, is inside one of torch's transforms."""
    x, weight, bias, target = some(7, 16, 60, device, torch.float32, ignored=[1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    gradients = []
    for forward, backward in [(first, not first), (False, False)]:
        monkeypatch.setattr(launch, "enabled", forward)
        outputs = linear_log_prob(x, weight, target, linear_bias=bias, temperature=0.7, softcap=3.0)
        monkeypatch.setattr(launch, "enabled", backward)
        gradients.append(torch.autograd.grad(outputs.log_prob.sum() + outputs.entropy.sum(), leaves))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_backward_through_one_graph(device, path, chunk_rows, dtype):
    chunk_rows(3)
    x, weight, bias, target = some(7, 16, 60, device, dtype, ignored=[1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    outputs = linear_log_prob(x, weight, target, linear_bias=bias)[:2]
    upstream = [torch.rand(7, device=device) for _ in range(2)]
    first = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    for y in outputs:
        y.detach().zero_()  # nothing that backward needs is the caller's to overwrite
    second = torch.autograd.grad(outputs, leaves, upstream)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_second_derivative_is_refused_not_wrong(device, path):
    x, weight, _, target = some(3, 8, 20, device)
    (dx,) = torch.autograd.grad(
        linear_log_prob(x.requires_grad_(), weight, target).entropy.square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("blocks", [1, 8])
def test_error_of_the_gradients_does_not_grow_with_blocks_and_slices(device, path, chunk_rows, blocks):
    x, weight, bias, target = some(256, 16, 50, device, torch.bfloat16)
    chunk_rows(256 // blocks, slices=16)
    check(x, weight, bias, target)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_autocast_with_an_fp32_head(device, path, chunk_rows, with_bias, input_dtype):
    chunk_rows(4)
    x, weight, bias, target = some(10, 16, 70, device, ignored=[2])
    x, bias = x.to(input_dtype), bias if with_bias else None

    def autocast(function):
        def call(*args, **options):
            with torch.autocast(device.type, torch.bfloat16):
                return function(*args, **options)

        return call

    actual = run(autocast(linear_log_prob), x, weight, bias, target)
    own = run(autocast(naive), x, weight, bias, target)
    exact = run(naive, *(None if t is None else t.double() for t in (x, weight, bias)), target)
    wide = torch.float32
    assert [t.dtype for t in actual] == [wide, wide, torch.bool, input_dtype, wide, wide][: len(actual)]
    for i in (0, 1, *range(3, len(actual))):
        assert relative_error(actual[i], exact[i]) <= 1.5 * relative_error(own[i], exact[i]) + 8e-4


def test_gradcheck(device):
    x, weight, bias, target = some(5, 3, 7, device, torch.float64, ignored=[1])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def outputs(x, weight, bias):
        return linear_log_prob(x, weight, target, linear_bias=bias, **OPTIONS["all"])[:2]

    assert torch.autograd.gradcheck(outputs, leaves)


def test_inputs_stay_unchanged_and_the_same_bits_come_every_time(device, path, chunk_rows):
    chunk_rows(4)
    tensors = some(9, 8, 70, device)
    before = [t.clone() for t in tensors]
    runs = [run(linear_log_prob, *tensors) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_compiles_without_a_graph_break_on_the_cpu(monkeypatch, chunk_rows, used):
    monkeypatch.setattr(importlib.import_module("liger.ops.launch"), "enabled", False)
    chunk_rows(4)
    torch._dynamo.reset()
    compiled = torch.compile(linear_log_prob, fullgraph=True, backend="aot_eager")
    for rows in (6, 9):  # the second has dynamic shapes
        tensors = some(rows, 8, 30, "cpu", ignored=[0, 3])
        eager = run(linear_log_prob, *tensors, used=used, temperature=0.8)
        for a, b in zip(run(compiled, *tensors, used=used, temperature=0.8), eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("logits", "options", "top1"),
    [
        ([50.0, 60.0, 1.0], {"softcap": 1.0}, True),  # both are at the cap: the first of equals
        ([5.0, 6.0, 1.0], {"logit_scale": 0.0}, True),
        ([5.0, 6.0, 7.0], {"logit_scale": -1.0}, True),
        ([5.0, 6.0, 1.0], {}, False),
        ([float("nan"), 6.0, 1.0], {}, False),
        ([float("-inf")] * 3, {}, False),
    ],
)
def test_the_argmax_is_that_of_the_softmax(device, path, logits, options, top1):
    x, weight = torch.ones(1, 1, device=device), torch.tensor(logits, device=device)[:, None]
    target = torch.zeros(1, dtype=torch.int64, device=device)
    assert linear_log_prob(x, weight, target, **options).is_top1.item() == top1


@pytest.mark.parametrize("label", [5, -1])
def test_label_out_of_range_is_named_on_the_cpu(path, label):
    target = torch.tensor([0, label, -100])
    with pytest.raises(IndexError, match=f"linear_log_prob: label {label} is out of range: expected 0 to 4, or -100"):
        linear_log_prob(torch.randn(3, 8), torch.randn(5, 8), target)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"linear_weight": torch.empty(0)}, ValueError, r"linear_weight is empty, shape \(0,\): has ZeRO-3"),
        ({"linear_weight": torch.ones(5, 7)}, ValueError, r"linear_weight has shape \(5, 7\), expected \(V, 8\)"),
        ({"linear_weight": torch.ones(5, 8).double()}, TypeError, "input is torch.float32 and linear_weight is"),
        ({"linear_bias": torch.ones(4)}, ValueError, r"linear_bias has shape \(4,\), expected \(5,\)"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target has shape \(3,\), expected \(2,\)"),
        ({"target": torch.zeros(2)}, TypeError, "target must be int64 or int32"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, not 0.0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be positive and finite, not inf"),
        ({"temperature": torch.ones(2)}, ValueError, r"temperature has shape \(2,\), expected one number"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive and finite, or None"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, not nan"),
        ({"temperature": torch.tensor(2.0, requires_grad=True)}, ValueError, "temperature requires a gradient"),
        ({"logit_scale": torch.tensor(2.0, requires_grad=True)}, ValueError, "logit_scale requires a gradient"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {"linear_weight": torch.ones(5, 8), "target": torch.zeros(2, dtype=torch.int64)} | changed
    with pytest.raises(error, match=f"linear_log_prob: {message}"):
        linear_log_prob(torch.ones(2, 8), **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("used", USED.values(), ids=USED)
def test_compiles_and_captures_also_with_ignored_rows(device, chunk_rows, used):
    """Eager, compiled and replayed from a CUDA graph: the same numbers."""
    torch._dynamo.reset()
    chunk_rows(100)
    compiled = torch.compile(linear_log_prob, fullgraph=True)
    for rows in (256, 300):
        tensors = some(rows, 32, 4096, device, torch.bfloat16, ignored=range(0, rows, 4))
        eager = run(linear_log_prob, *tensors, used=used)
        for a, b in zip(run(compiled, *tensors, used=used), eager, strict=True):
            torch.testing.assert_close(a, b)
    leaves = [t.requires_grad_() for t in tensors[:2]]
    upstream = torch.rand(300, device=device)

    def step():
        outputs = linear_log_prob(*leaves, tensors[3])
        return *outputs, *torch.autograd.grad(outputs[:2], leaves, (upstream, upstream))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_host_never_waits_for_the_gpu(device, chunk_rows):
    chunk_rows(16)
    x, weight, bias, target = some(40, 32, 500, device, torch.bfloat16, ignored=[3])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")  # compile first
        try:
            out = linear_log_prob(x, weight, target, linear_bias=bias)
            torch.autograd.grad(out.log_prob.sum() + out.entropy.mean(), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_chunk_past_two_to_the_31_elements(device, chunk_rows):
    torch.use_deterministic_algorithms(False)  # poisoning gigabytes says nothing here
    columns = 128256
    rows = 2**31 // columns + 3
    chunk_rows(rows, slices=1)
    x, weight, _, target = some(rows, 16, columns, device, torch.bfloat16)
    x.requires_grad_()

    def results(x, target):
        out = linear_log_prob(x, weight, target)
        return *out, *torch.autograd.grad(out.log_prob.sum() + out.entropy.sum(), x)

    for whole, alone in zip(results(x, target), results(x[-3:], target[-3:].clone()), strict=True):
        torch.testing.assert_close(whole[-3:], alone[-3:])


@pytest.mark.gpu
def test_peak_memory(device):
    torch.use_deterministic_algorithms(False)
    rows, width, columns = 4096, 512, 65536
    x, weight, _, target = some(rows, width, columns, device, torch.bfloat16)
    x.requires_grad_()
    dw, logits = weight.numel() * 2, rows * columns * 2

    def peak():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_log_prob(x, weight, target).log_prob.sum().backward()
        x.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    peak()  # cuBLAS takes its workspace
    slack = 32 * 2**20
    assert peak() <= linear_chunks.CHUNK_BYTES + slack <= logits
    weight.requires_grad_()
    assert dw <= peak() <= linear_chunks.CHUNK_BYTES + dw + slack
