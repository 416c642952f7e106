"""add_rms_norm against fp64, through the kernels and through the reference."""

from __future__ import annotations

import pytest
import torch

from liger.ops import add_rms_norm, rms_norm
from liger.ops.add_rms_norm import reference
from liger.ops.rms_norm import Cast
from liger.testing import assert_as_exact_as

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    pytest.param(FP32, FP32, FP32, id="fp32"),
    pytest.param(BF16, BF16, BF16, id="bf16"),
    pytest.param(FP16, FP16, FP16, id="fp16"),
    pytest.param(BF16, BF16, FP32, id="bf16-fp32weight"),
    pytest.param(BF16, FP32, BF16, id="bf16-fp32residual"),
]
SHAPES = [(40, 3), (2, 5, 64), (17, 300), (3, 4096), (2, 5000)]


def check(x, residual, weight, upstream, used=(True, True), **options) -> None:
    """The outputs and gradients of add_rms_norm obey the error rule."""
    names = ["y", "total", "dx", "dresidual"] + (["dw"] if weight is not None else [])

    def run(function, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, residual, weight) if t is not None]
        outputs = function(*leaves, **options)
        pairs = [(y, dy.to(y.dtype)) for y, dy, use in zip(outputs, upstream, used, strict=True) if use]
        torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
        return [*outputs, *(leaf.grad for leaf in leaves)]

    for name, actual, own, exact in zip(
        names, run(add_rms_norm), run(reference), run(reference, torch.float64), strict=True
    ):
        if own is None:
            assert actual is None or not actual.any(), f"{name}: a gradient where there is none"
        else:
            assert_as_exact_as(actual, own, exact, name)


def normal(shape, device, *dtypes):
    return [torch.randn(shape, device=device).to(dtype) for dtype in dtypes]


@pytest.mark.parametrize(("x_dtype", "residual_dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_matches_fp64(device, path, x_dtype, residual_dtype, weight_dtype, shape, cast: Cast, offset: float):
    x, residual, dy, dtotal = normal(shape, device, x_dtype, residual_dtype, x_dtype, x_dtype)
    weight = torch.rand(shape[-1], device=device).to(weight_dtype)
    check(x, residual, weight, (dy, dtotal), eps=1e-5, cast=cast, offset=offset)


@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_without_weight(device, path, cast: Cast):
    x, residual, *upstream = normal((5, 96), device, BF16, BF16, BF16, BF16)
    check(x, residual, None, upstream, cast=cast)


def test_strided_inputs_and_expanded_gradients(device, path):
    x = torch.randn(4, 6, 32, device=device).transpose(0, 1)
    residual = torch.randn(6, 4, 64, device=device)[..., ::2]
    weight = torch.rand(64, device=device)[::2]
    check(x, residual, weight, [torch.randn(1, device=device).expand(6, 4, 32) for _ in range(2)])


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["only the norm", "only the sum"])
@pytest.mark.parametrize("residual_dtype", [BF16, FP32])
def test_one_output_unused(device, path, used, residual_dtype):
    x, residual, *upstream = normal((7, 40), device, BF16, residual_dtype, BF16, BF16)
    check(x, residual, torch.rand(40, device=device).to(BF16), upstream, used)


@pytest.mark.parametrize("used", [(True, False), (False, True)])
def test_an_unused_output_costs_no_zeros(device, used, monkeypatch):
    pytest.importorskip("triton")
    import sys

    norm, asked = sys.modules["liger.ops.rms_norm"], []
    launch = norm.launch
    monkeypatch.setattr(norm, "launch", lambda *a, **options: asked.append(options) or launch(*a, **options))
    x, residual = (torch.randn(3, 8, device=device, requires_grad=True) for _ in range(2))
    outputs = add_rms_norm(x, residual)
    outputs[used.index(True)].sum().backward()
    assert [options["HAS_DTOTAL"] for options in asked[1:]] == ([False] if used[0] else [])


def test_the_two_steps_give_the_same_bits_forward(device, path):
    for cast, dtype in (("llama", BF16), ("gemma", BF16), ("llama", FP32)):
        x, residual, weight = (*normal((5, 96), device, BF16, dtype), torch.rand(96, device=device).to(dtype))
        y, total = add_rms_norm(x, residual, weight, cast=cast)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, rms_norm(x + residual, weight, cast=cast))


def test_x_and_residual_may_be_one_tensor(device, path):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    same, twice = add_rms_norm(x, x), reference(x, x)
    grads = [torch.autograd.grad([y.square().sum() for y in ys], x)[0] for ys in (same, twice)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("used", [(True, True), (False, True)])
def test_leaves_do_not_share_one_gradient(device, path, used):
    """Both inputs have the same gradient; what happens to the one's must not happen to the other's."""
    x, residual = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
    upstream = [torch.randn(3, 16, device=device) for _ in range(2)]
    kept = [t.clone() for t in upstream]
    pairs = [(y, dy) for y, dy, use in zip(add_rms_norm(x, residual), upstream, used, strict=True) if use]
    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)
    (x.exp() * 2).sum().backward()
    assert torch.equal(residual.grad, before)
    residual.grad.zero_()
    assert all(torch.equal(a, b) for a, b in zip(upstream, kept, strict=True))


def test_a_gradient_handed_on_is_not_added_to_in_place(device, path):
    """A chain of blocks: every residual's gradient is the sum of two, one of which other nodes hold as well."""

    def run(function):
        torch.manual_seed(0)
        residual = embedded = torch.randn(4, 16, device=device, requires_grad=True)
        y = residual * 1.5
        for _ in range(3):
            y, residual = function(y.sin(), residual)
        return torch.autograd.grad(y.square().sum() + residual.cos().sum(), embedded)[0]

    torch.testing.assert_close(run(add_rms_norm), run(reference))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_sum_changed_in_place_is_refused_or_right_never_wrong(device, path, dtype):
    x, residual = (torch.randn(3, 16, device=device).to(dtype).requires_grad_() for _ in range(2))
    y, total = add_rms_norm(x, residual)
    expected = torch.autograd.grad(y.sum() + (total * 0.5).sum(), (x, residual), retain_graph=True)
    y, total = add_rms_norm(x, residual)
    loss = y.sum() + total.mul_(0.5).sum()
    if path == "reference" and dtype == BF16:  # which keeps its own copy in fp32
        torch.testing.assert_close(torch.autograd.grad(loss, (x, residual)), expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_y_may_be_changed_in_place(device, path):
    x, residual = (torch.randn(3, 16, device=device, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad((add_rms_norm(x, residual)[0] * 0.5).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(add_rms_norm(x, residual)[0].mul_(0.5).sum(), x), expected)


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient(device, path, frozen):
    inputs = [torch.randn(4, 16, device=device), torch.randn(4, 16, device=device), torch.rand(16, device=device)]
    for i, t in enumerate(inputs):
        t.requires_grad_(i != frozen)
    y, total = add_rms_norm(*inputs)
    (y.square().sum() + total.sum()).backward()
    assert [t.grad is None for t in inputs] == [i == frozen for i in range(3)]


def test_only_the_weight_trains(device, path):
    x, residual, weight = (*normal((4, 16), device, FP32, FP32), torch.rand(16, device=device, requires_grad=True))
    y, total = add_rms_norm(x, residual, weight)
    (dw,) = torch.autograd.grad(y.square().sum(), weight)
    (expected,) = torch.autograd.grad(reference(x, residual, weight)[0].square().sum(), weight)
    torch.testing.assert_close(dw, expected)
    assert torch.equal(total, x + residual)


def test_rows_wider_than_shared_memory_takes(device, path):
    x, residual, *upstream = normal((3, 20000), device, BF16, BF16, BF16, BF16)
    check(x, residual, torch.rand(20000, device=device).to(BF16), upstream)


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("x", "residual", "options", "error", "message"),
    [
        (X.long(), X, {}, TypeError, "add_rms_norm: x must have a floating-point dtype, not torch.int64"),
        (X, X.long(), {}, TypeError, "residual must have a floating-point dtype, not torch.int64"),
        (X, X[:1], {}, ValueError, r"residual has shape \(1, 8\), expected x's shape \(2, 8\)"),
        (X, X.to("meta"), {}, ValueError, "residual is on meta, expected x's device cpu"),
        (X, X, {"weight": torch.ones(7)}, ValueError, r"add_rms_norm: weight has shape \(7,\), expected .* \(8,\)"),
        (X, X, {"cast": "qwen"}, ValueError, "add_rms_norm: cast must be 'llama' or 'gemma', not 'qwen'"),
    ],
)
def test_bad_input_is_named(x, residual, options, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(x, residual, **options)
