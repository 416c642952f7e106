"""layer_norm against fp64, through the kernels and through the reference."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from liger.ops.layer_norm import layer_norm
from liger.testing import assert_as_exact_as

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32weight"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-bf16weight"),
]
SHAPES = [(1, 5), (3, 7), (2, 5, 64), (9, 80), (67, 300), (3, 4096), (2, 5000), (7, 9001)]


def torch_layer_norm(x, weight, bias, eps):
    """torch's own; for mixed dtypes, which it refuses on some devices, in fp32 and rounded to x's dtype."""
    if all(t is None or t.dtype == x.dtype for t in (weight, bias)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    weight, bias = (t if t is None else t.float() for t in (weight, bias))
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def check(x, weight, bias, dy, eps=1e-5) -> None:
    """Output and gradients of layer_norm obey the error rule, against torch's layer_norm."""
    given = {"dx": x, "dw": weight, "db": bias}
    names = ["y"] + [name for name, t in given.items() if t is not None]

    def run(function, dtype=None):
        inputs = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in given.values()]
        y = function(*inputs, eps)
        return [y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy.to(y.dtype))]

    for name, actual, own, exact in zip(
        names, run(layer_norm), run(torch_layer_norm), run(torch_layer_norm, torch.float64), strict=True
    ):
        assert_as_exact_as(actual, own, exact, name)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, path, x_dtype, weight_dtype, shape):
    x = torch.randn(shape, device=device).to(x_dtype)
    weight = torch.rand(shape[-1], device=device).to(weight_dtype)
    bias = torch.randn(shape[-1], device=device).to(weight_dtype)
    check(x, weight, bias, torch.randn(shape, device=device).to(x_dtype))


@pytest.mark.parametrize("columns", [96, 9001])
@pytest.mark.parametrize(("with_weight", "with_bias"), [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(device, path, with_weight, with_bias, columns):
    x = torch.randn(5, columns, device=device, dtype=torch.bfloat16)
    weight = torch.rand(columns, device=device, dtype=torch.bfloat16) if with_weight else None
    bias = torch.rand(columns, device=device, dtype=torch.bfloat16) if with_bias else None
    check(x, weight, bias, torch.randn_like(x))


def test_mean_far_above_the_spread(device, path):
    """mean(x²) − mean(x)² would cancel: the variance is taken of x − mean(x)."""
    x = 1000 + torch.randn(4, 300, device=device)
    torch.testing.assert_close(layer_norm(x), layer_norm(x.double()).float(), rtol=1e-3, atol=1e-3)


def test_one_column_is_the_bias(device, path):
    """x̂ and every gradient but the bias's are 0: there is nothing to normalise."""
    x = torch.randn(5, 1, device=device, requires_grad=True)
    weight, bias = (torch.randn(1, device=device, requires_grad=True) for _ in range(2))
    y = layer_norm(x, weight, bias)
    torch.testing.assert_close(y, bias.expand(5, 1))
    y.sum().backward()
    for gradient, expected in ((x.grad, 0.0), (weight.grad, 0.0), (bias.grad, 5.0)):
        torch.testing.assert_close(gradient, torch.full_like(gradient, expected), rtol=0, atol=1e-3)


def test_weights_and_biases_gradients_have_their_own_dtypes(device, path):
    x = torch.randn(3, 8, device=device, dtype=torch.bfloat16)
    weight = torch.ones(8, device=device, requires_grad=True)
    bias = torch.zeros(8, device=device, dtype=torch.float16, requires_grad=True)
    y = layer_norm(x, weight, bias)
    y.sum().backward()
    assert (y.dtype, weight.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32, torch.float16)


def test_more_rows_than_programs_sum_to_the_same_bits_every_time(device, path):
    x = torch.randn(700, 64, device=device)
    weight = torch.rand(64, device=device, requires_grad=True)
    bias = torch.rand(64, device=device, requires_grad=True)
    dy = torch.randn(700, 64, device=device)
    runs = [torch.autograd.grad(layer_norm(x, weight, bias), (weight, bias), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    check(x, weight, bias, dy)


@pytest.mark.gpu
def test_only_few_elements_are_torchs(device, monkeypatch):
    module = sys.modules["liger.ops.layer_norm"]
    monkeypatch.setattr(module, "FEW_ELEMENTS", 4 * 64)
    x = torch.randn(4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.rand(2, 64, device=device, dtype=torch.bfloat16)
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (64,), weight, bias))

    def function(*args):
        return type(layer_norm(*args).grad_fn).__name__

    assert function(x, weight, bias) == "NativeLayerNormBackward0"
    assert function(torch.cat([x, x]), weight, bias) == "liger::layer_normBackward"
    assert function(x, weight.float(), bias.float()) == "liger::layer_normBackward"
    with torch.autocast("cuda", torch.bfloat16):
        assert function(x, weight, bias) == "liger::layer_normBackward"


def test_fp64_is_torchs_own(device):
    x = torch.randn(4, 9, device=device, dtype=torch.float64)
    weight, bias = torch.rand(2, 9, device=device, dtype=torch.float64)
    assert torch.equal(layer_norm(x, weight, bias), F.layer_norm(x, (9,), weight, bias))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(2, 8, dtype=torch.int64), {}, TypeError, "floating-point dtype, not torch.int64"),
        (torch.tensor(1.0), {}, ValueError, "x has no dimension"),
        (torch.ones(2, 8), {"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\), expected .* \(8,\)"),
        (torch.ones(2, 8), {"bias": torch.ones(1, 8)}, ValueError, r"bias has shape \(1, 8\), expected .* \(8,\)"),
        (torch.ones(2, 8), {"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
        (torch.ones(2, 8), {"bias": torch.ones(8, dtype=torch.int32)}, TypeError, "bias must .* not torch.int32"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        layer_norm(x, **options)
