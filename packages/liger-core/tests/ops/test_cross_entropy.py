"""cross_entropy against fp64, through the kernels and through the reference.

Over 300 lines: an op has one file of tests.
"""

from __future__ import annotations

import importlib
import random

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from liger.ops import linear_cross_entropy, loss_rows, upstream_scale
from liger.ops.cross_entropy import cross_entropy
from liger.testing import assert_as_exact_as
from loss_cases import DTYPES, OPTIONS, upstream_of
from loss_cases import cross_entropy_in_torch as naive

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(function, logits, target, upstream=None, **options):
    leaf = logits.detach().requires_grad_()
    loss = function(leaf, target, **options)
    return loss, *torch.autograd.grad(loss, leaf, upstream if upstream is None else upstream.to(loss.dtype))


def check(logits, target, upstream=None, **options):
    """Loss and gradient of cross_entropy obey the error rule; returns both."""
    actual = run(cross_entropy, logits, target, upstream, **options)
    own = run(naive, logits, target, upstream, **options)
    exact = run(naive, logits.double(), target, upstream, **options)
    for name, *three in zip(("loss", "gradient"), actual, own, exact, strict=True):
        assert_as_exact_as(*three, name)
    return actual


def some(rows, columns, device, dtype=torch.float32, ignored=()):
    logits = (2 * torch.randn(rows, columns, device=device)).to(dtype)
    target = torch.randint(0, columns, (rows,), device=device)
    target[list(ignored)] = -100
    return logits, target


@pytest.fixture
def small_tiles(monkeypatch):
    """A row of a few hundred columns then takes several tiles, the last not full."""
    monkeypatch.setattr(loss_rows, "tile_of", lambda *_: (2, 64, 1))


@pytest.mark.parametrize(
    ("columns", "on_h100", "on_h200"),
    [(32000, 4, 4), (50304, 2, 4), (65536, 2, 2), (100352, 1, 2), (201088, 1, 2), (262144, 1, 1)],
)
def test_a_multiprocessor_is_at_as_many_rows_as_its_gpu_is_fast_with(columns, on_h100, on_h200):
    warps = [loss_rows.tile_of(columns, 2, l2_bytes=mib * 2**20)[2] for mib in (50, 60)]
    assert [32 // w for w in warps] == [on_h100, on_h200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 127, 1000, 32001])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_fp64(device, path, dtype, columns, reduction):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    rows = 3 if columns > 1000 else 5
    logits, target = some(rows, columns, device, dtype, ignored=[2])
    check(logits, target, upstream_of(reduction, rows, device), reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_match_fp64(device, path, small_tiles, dtype, reduction, options):
    if path == "kernel" and dtype == torch.float64:
        pytest.skip("fp64 has one path")
    logits, target = some(16, 307, device, dtype, ignored=[0, 15])
    check(logits, target, upstream_of(reduction, 16, device), reduction=reduction, **options)


@pytest.mark.parametrize("denominator", [7, 2.5, torch.tensor(7), torch.tensor([3.0], dtype=torch.float64)], ids=repr)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_denominator_replaces_the_count(device, path, denominator, reduction):
    logits, target = some(5, 40, device, torch.bfloat16, ignored=[1])
    loss, _ = check(logits, target, reduction=reduction, denominator=denominator)
    assert loss.shape == ()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("denominator", [4, 0])
def test_all_labels_ignored_with_a_denominator_is_zero(device, path, dtype, denominator):
    logits, target = some(3, 20, device, dtype, ignored=[0, 1, 2])
    loss, gradient = run(cross_entropy, logits, target, reduction="sum", denominator=denominator)
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_labels_ignored_in_the_mean_is_as_in_torch(device, path, dtype):
    logits, target = some(3, 20, device, dtype, ignored=[0, 1, 2])
    loss, gradient = run(cross_entropy, logits, target)
    assert loss.isnan()
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize(("reduction", "loss"), [("mean", float("nan")), ("sum", 0.0)])
def test_no_rows(device, path, reduction, loss):
    logits, target = some(0, 8, device)
    actual, gradient = run(cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(actual.item(), loss, equal_nan=True)
    assert gradient.shape == (0, 8)


def test_ignore_index_may_be_a_class(device, path):
    logits, target = some(6, 9, device)
    target[:3] = 2
    check(logits, target, ignore_index=2)


def test_int32_labels_in_any_shape(device, path):
    logits, target = some(6, 50, device, ignored=[4])
    check(logits.view(2, 3, 50), target.int().view(2, 3), torch.rand(2, 3, device=device), reduction="none")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_gradient_needed_gives_the_right_loss(device, path, reduction):
    logits, target = some(4, 3, device)
    expected = naive(logits, target, reduction=reduction)
    torch.testing.assert_close(cross_entropy(logits, target, reduction=reduction), expected)
    with torch.no_grad():
        quiet = cross_entropy(logits.clone().requires_grad_(), target, reduction=reduction)
    torch.testing.assert_close(quiet, expected)
    assert not quiet.requires_grad


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_gradient_of_the_true_class_near_certainty(device, path, p):
    """p − 1 must be taken before p is rounded to bf16."""
    columns = 1001
    logits = torch.zeros(1, columns, device=device)
    logits[0, 5] = torch.tensor(p * (columns - 1) / (1 - p)).log()
    logits = logits.bfloat16()
    target = torch.tensor([5], device=device)
    for function in (cross_entropy, naive):
        _, gradient = run(function, logits, target)
        _, exact = run(naive, logits.double(), target)
        assert (gradient[0, 5] / exact[0, 5] - 1).abs() < 2**-8


@pytest.mark.parametrize("columns", [3, 32001, 129920, 151936, 256000, 262143])
def test_log_prob_of_a_peaked_softmax_is_never_positive(device, path, columns):
    """A last tile that is not full must add nothing to the sum."""
    logits, target = some(2, columns, device, torch.bfloat16)
    logits[0, target[0]] = 40.0
    loss, _ = check(logits, target, torch.ones(2, device=device), reduction="none")
    assert (loss >= 0).all()


@pytest.mark.parametrize("softcap", [1.0, 30.0])
@pytest.mark.parametrize("columns", [32001, 256000])
def test_padding_stays_out_of_the_sum_after_a_softcap(device, path, softcap, columns):
    """softcap · tanh(−inf) is −softcap: lanes past V must be masked after it."""
    logits = torch.full((1, columns), -3.0, device=device)
    check(logits, torch.tensor([7], device=device), softcap=softcap)


def test_softcap_keeps_the_digits_of_logits_far_below_it(device, path):
    """tanh from exp alone is off by a rounding of 1, whatever the argument: times the softcap, that shows."""
    logits, target = some(20, 3, device)
    check(logits, target, softcap=1000.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_digits_near_certainty(device, path, reduction):
    """z_label − lse would be off by a rounding of lse, which is 40 here, where the loss and 1 − p are 1e-3."""
    logits = torch.zeros(30, 50, device=device)
    logits[:, 0] = torch.linspace(40, 50, 30)
    logits[:, 1] = logits[:, 0] - torch.linspace(5, 8, 30, device=device)
    target = torch.zeros(30, dtype=torch.int64, device=device)
    check(logits, target, torch.ones(30 if reduction == "none" else (), device=device), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [5, 9001])
def test_all_logits_but_one_minus_infinity(device, path, dtype, columns):
    logits = torch.full((2, columns), float("-inf"), device=device, dtype=dtype)
    logits[0, 3], logits[1, 0] = 1.5, torch.finfo(dtype).min
    loss, gradient = run(cross_entropy, logits, torch.tensor([3, 0], device=device))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


def test_strided_logits_are_read_where_they_lie(device, path):
    wide = torch.randn(6, 3, 64, device=device)
    target = torch.randint(0, 32, (6, 3), device=device)
    for logits, labels in (
        (wide[..., :40], target),
        (wide[::2, :, :40], target[::2]),
        (wide[:, 1:, :40], target[:, 1:]),
        (wide.transpose(0, 1), target.t()),
        (wide[..., ::2], target),
        (wide[:1, :1].expand(6, 3, 64), target),
    ):
        check(logits, labels)


def test_upstream_gradient_of_any_stride(device, path):
    logits, target = some(6, 30, device)
    check(logits, target, torch.full((1,), 0.5, device=device).expand(6), reduction="none")
    check(logits, target, torch.rand(6, 3, device=device)[:, 1], reduction="none")


def test_producer_that_saved_its_output_and_two_losses_of_one_tensor(device, path):
    """Logits are never overwritten: softmax needs its output in backward, the second loss its input."""
    x, target = some(4, 60, device)
    other = target.roll(1)

    def both(function, x):
        leaf = x.detach().requires_grad_()
        produced = leaf.softmax(-1)
        before = produced.detach().clone()
        loss = function(produced, target) + 2 * function(produced, other, reduction="sum")
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(produced.detach(), before)
        return gradients

    for actual, own, exact in zip(both(cross_entropy, x), both(naive, x), both(naive, x.double()), strict=True):
        assert_as_exact_as(actual, own, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_backward_through_one_graph(device, path, dtype, reduction):
    """Forward's gradient is used up by the first backward; what that returned must not change either."""
    logits, target = some(4, 200, device, dtype, ignored=[1])
    upstream = torch.rand(4 if reduction == "none" else (), device=device)

    def two(function, logits):
        leaf = logits.detach().requires_grad_()
        loss = function(leaf, target, reduction=reduction)
        first = torch.autograd.grad(loss, leaf, upstream.to(loss.dtype), retain_graph=True)[0]
        kept = first.clone()
        second = torch.autograd.grad(loss, leaf, 3 * upstream.to(loss.dtype))[0]
        assert torch.equal(first, kept)
        return first, second

    for three in zip(two(cross_entropy, logits), two(naive, logits), two(naive, logits.double()), strict=True):
        assert_as_exact_as(*three, depth=2)


def test_two_backwards_accumulate_into_grad(device, path):
    logits, target = some(3, 30, device)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, target)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


def test_fp16_gradient_survives_a_large_denominator_until_the_loss_scale_arrives(device, path):
    logits, target = some(3, 50, device, torch.float16)
    _, gradient = check(logits, target, torch.tensor(2.0**24, device=device), reduction="sum", denominator=2.0**25)
    assert (gradient != 0).all()


def test_same_bits_every_time(device, path):
    logits, target = some(9, 700, device)
    runs = [run(cross_entropy, logits, target) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inputs_stay_unchanged(device, path):
    logits, target = some(4, 70, device, ignored=[2])
    upstream = torch.rand(4, device=device)
    before = [t.clone() for t in (logits, target, upstream)]
    run(cross_entropy, logits, target, upstream, reduction="none")
    run(cross_entropy, logits, target)
    assert all(torch.equal(a, b) for a, b in zip((logits, target, upstream), before, strict=True))


@pytest.mark.parametrize("trains", [False, True])
def test_a_gradient_that_nobody_needs_is_not_computed(device, monkeypatch, trains):
    module, gradients = importlib.import_module("liger.ops.cross_entropy"), []
    monkeypatch.setattr(module, "fill_rows", lambda *args, **_: gradients.append(args[5]) or loss_rows.fill_rows(*args))
    logits, target = some(2, 8, device)
    with torch.set_grad_enabled(not trains):  # logits that need none, and those that do where nobody trains
        cross_entropy(logits.requires_grad_(trains), target)
    assert gradients == [None]


@pytest.mark.parametrize("trains", [False, True])
def test_a_forward_derivative(device, path, trains):
    logits, target = some(2, 8, device)
    expected = torch.func.grad(F.cross_entropy)(logits, target)[:, 0].sum()
    logits.requires_grad_(trains)
    with torch.autograd.forward_ad.dual_level():
        first = torch.zeros_like(logits).index_fill(1, torch.tensor([0], device=device), 1.0)
        loss = cross_entropy(torch.autograd.forward_ad.make_dual(logits, first), target)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss).tangent, expected)


def test_gradients_of_each_sample(device, path):
    logits, target = (t.unsqueeze(1) for t in some(3, 8, device))
    ours, theirs = (torch.vmap(torch.func.grad(loss))(logits, target) for loss in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("margin", [30.0, 40.0])
def test_a_denominator_divides_the_gradient_where_the_loss_is_exactly_zero(device, path, margin):
    logits = torch.tensor([[margin, 0.0], [margin, 0.0]], device=device, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([0, 0], device=device), denominator=1000.0)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = torch.full((2,), -margin, device=device).exp() / 1000
    torch.testing.assert_close(gradient[:, 1], expected, rtol=1e-3, atol=0)


def test_a_fake_tensor_has_no_labels_to_look_at():
    with FakeTensorMode():
        assert cross_entropy(torch.randn(4, 32), torch.randint(32, (4,))).shape == ()


@pytest.mark.parametrize("shape", [(2, 8), (2, 1, 8)])
@pytest.mark.parametrize("strided", [False, True])
def test_second_derivative_is_refused_not_wrong(device, shape, strided):
    logits, target = some(2, 8, device)
    logits, target = logits.view(shape), target.view(shape[:-1])
    if strided:
        logits = logits.repeat_interleave(2, -1)[..., ::2]
    logits.requires_grad_()
    for square in (False, True):  # an upstream gradient that is a constant, and one with a graph
        loss = cross_entropy(logits, target)
        (gradient,) = torch.autograd.grad(loss.square() if square else loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(loss + gradient.sum(), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_z_loss_a_logit_may_be_too_large_to_square(device, path, dtype):
    logits = torch.tensor([[1e20, 0.0]], device=device).to(dtype)
    target = torch.tensor([0], device=device)
    assert cross_entropy(logits, target).item() == 0
    assert linear_cross_entropy(logits, torch.eye(2, device=device).to(dtype), target).item() == 0


@pytest.mark.parametrize("label", [5, -1])
def test_label_out_of_range_is_named_on_the_cpu(path, label):
    target = torch.tensor([0, label, -100])
    with pytest.raises(IndexError, match=f"label {label} is out of range: expected 0 to 4, or -100"):
        cross_entropy(torch.randn(3, 5), target)


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (torch.ones(2), {}, TypeError, "target must be int64 or int32, not torch.float32"),
        (torch.ones(3, dtype=torch.int64), {}, ValueError, r"target has shape \(3,\), expected \(2,\)"),
        (torch.ones(2, dtype=torch.int64, device="meta"), {}, ValueError, "target is on meta"),
        (torch.ones(2, dtype=torch.int64), {"reduction": "avg"}, ValueError, "not 'avg'"),
        (torch.ones(2, dtype=torch.int64), {"reduction": "none", "denominator": 3}, ValueError, "reduction is 'none'"),
        (torch.ones(2, dtype=torch.int64), {"denominator": torch.ones(2)}, ValueError, "expected one number"),
        (torch.ones(2, dtype=torch.int64), {"softcap": 0.0}, ValueError, "softcap must be positive"),
        (
            torch.ones(2, dtype=torch.int64),
            {"softcap": float("inf")},
            ValueError,
            "softcap must be positive and finite",
        ),
        (torch.ones(2, dtype=torch.int64), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int, not 1.5"),
        (torch.ones(2, dtype=torch.int32), {"ignore_index": 2**32}, ValueError, "beyond the int32 of target"),
        (torch.ones(2, dtype=torch.int64), {"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        (
            torch.ones(2, dtype=torch.int64),
            {"logit_scale": torch.tensor(2.0, requires_grad=True)},
            ValueError,
            "logit_scale requires a gradient and would get none",
        ),
    ],
)
def test_bad_input_is_named(target, options, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(torch.ones(2, 8), target, **options)


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match="floating-point dtype, not"):
        cross_entropy(torch.ones(2, 8, dtype=torch.int64), torch.ones(2, dtype=torch.int64))


@pytest.mark.gpu
@pytest.mark.parametrize("label", [100, -1])
def test_label_out_of_range_poisons_its_row_only_on_a_gpu(device, label, capfd):
    logits, target = some(4, 100, device)
    target[1] = label
    loss, gradient = run(cross_entropy, logits, target, torch.ones(4, device=device), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    assert gradient[1].isnan().all()
    assert not gradient[[0, 2, 3]].isnan().any()
    torch.cuda.synchronize()
    assert str(label) in capfd.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break_also_with_ignored_rows(device, reduction):
    torch._dynamo.reset()
    compiled = torch.compile(cross_entropy, fullgraph=True)
    for rows in (256, 300):  # the second has dynamic shapes
        logits, target = some(rows, 4096, device, torch.bfloat16, ignored=range(0, rows, 4))
        upstream = upstream_of(reduction, rows, device)
        eager = run(cross_entropy, logits, target, upstream, reduction=reduction)
        for a, b in zip(run(compiled, logits, target, upstream, reduction=reduction), eager, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_cuda_graph_gives_the_same(device):
    logits, target = some(64, 4096, device, torch.bfloat16, ignored=[3, 9])
    expected = run(cross_entropy, logits, target)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(cross_entropy, logits, target)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run(cross_entropy, logits, target)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.gpu
def test_host_never_waits_for_the_gpu(device):
    logits, target = some(16, 500, device, torch.bfloat16, ignored=[3])
    cases = [{}, {"reduction": "none"}, {"reduction": "sum", "denominator": torch.tensor(5, device=device)}]
    upstream = [torch.ones(16 if case.get("reduction") == "none" else (), device=device) for case in cases]
    for attempt in range(2):
        torch.cuda.set_sync_debug_mode("error" if attempt else "default")  # compile first
        try:
            for case, g in zip(cases, upstream, strict=True):
                run(cross_entropy, logits, target, g, **case)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_past_two_to_the_31_elements(device):
    torch.use_deterministic_algorithms(False)  # poisoning gigabytes says nothing here
    columns = 128256
    rows = 2**31 // columns + 3
    logits = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    target = torch.randint(0, columns, (rows,), device=device)
    upstream = torch.rand(rows, device=device)
    tail = slice(rows - 3, rows)
    for options in ({"reduction": "none"}, {"reduction": "sum"}):
        g = upstream if options["reduction"] == "none" else upstream[0]
        g_tail = upstream[tail] if options["reduction"] == "none" else upstream[0]
        _, whole = run(cross_entropy, logits, target, g, **options)
        _, alone = run(cross_entropy, logits[tail].clone(), target[tail].clone(), g_tail, **options)
        assert torch.equal(whole[tail], alone)
        del whole


@pytest.mark.gpu
def test_on_a_device_that_is_not_current():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    logits, target = some(4, 300, torch.device("cuda:0"))
    first = run(cross_entropy, logits, target)
    second = run(cross_entropy, logits.to("cuda:1"), target.to("cuda:1"))
    assert all(torch.equal(a, b.to("cuda:0")) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_new_row_counts_compile_nothing(device):
    kernels = (loss_rows._rows_kernel, upstream_scale._scale_kernel)

    def variants():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def both(rows):
        logits, target = some(rows, 320, device, torch.bfloat16)
        run(cross_entropy, logits, target)
        run(cross_entropy, logits, target, torch.ones(rows, device=device), reduction="none")

    for rows in (2, 33):
        both(rows)
    before = variants()
    assert before >= 3, "the count does not see Triton's cache"
    chance = random.Random(0)
    for rows in (1, 16, *(chance.randint(1, 300) for _ in range(50))):
        both(rows)
    assert variants() == before


@pytest.mark.gpu
def test_peak_memory_is_one_gradient(device):
    torch.use_deterministic_algorithms(False)
    logits, target = some(1024, 32768, device, torch.bfloat16)
    run(cross_entropy, logits, target)
    size = logits.numel() * logits.element_size()

    def peak(function):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before

    assert peak(lambda: run(cross_entropy, logits, target)) < 1.01 * size
    assert peak(lambda: cross_entropy(logits, target)) < 0.01 * size
