"""rms_norm against fp64, through the kernels and through the reference."""

from __future__ import annotations

import pytest
import torch

from liger.ops.rms_norm import Cast, reference, rms_norm
from liger.testing import assert_as_exact_as

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32weight"),
]
SHAPES = [(1, 3), (3, 7), (2, 5, 64), (9, 80), (17, 300), (3, 4096), (2, 5000), (7, 9001)]


def check(x, weight, dy, **options) -> None:
    """Output and gradients of rms_norm obey the error rule."""
    names = ["y", "dx"] + (["dw"] if weight is not None else [])

    def run(function, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (x, weight) if t is not None]
        y = function(*leaves, **options)
        return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    for name, actual, own, exact in zip(
        names, run(rms_norm), run(reference), run(reference, torch.float64), strict=True
    ):
        assert_as_exact_as(actual, own, exact, name)


@pytest.mark.parametrize(("x_dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("cast", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_matches_fp64(device, path, x_dtype, weight_dtype, shape, cast: Cast, offset: float):
    x = torch.randn(shape, device=device).to(x_dtype)
    weight = torch.rand(shape[-1], device=device).to(weight_dtype)
    check(x, weight, torch.randn(shape, device=device).to(x_dtype), eps=1e-5, cast=cast, offset=offset)


@pytest.mark.parametrize("columns", [96, 9001])
def test_without_weight(device, path, columns):
    x = torch.randn(5, columns, device=device, dtype=torch.bfloat16)
    check(x, None, torch.randn_like(x), cast="gemma")


def test_strided_input_and_expanded_gradient(device, path):
    x = torch.randn(4, 6, 32, device=device).transpose(0, 1)
    check(x, torch.rand(32, device=device), torch.ones(1, device=device).expand(6, 4, 32))


@pytest.mark.parametrize("columns", [8, 2000])
def test_without_an_eps(device, path, columns):
    """The rows that a program has beside the last one are 0."""
    x = torch.randn(3, columns, device=device)
    check(x, torch.rand(columns, device=device), torch.randn_like(x), eps=0.0)


def test_no_rows(device, path):
    x = torch.randn(0, 8, device=device, requires_grad=True)
    weight = torch.rand(8, device=device, requires_grad=True)
    rms_norm(x, weight).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_output_dtype_promotes_as_llama_and_stays_as_gemma(device, path):
    x, weight = torch.randn(2, 8, device=device, dtype=torch.bfloat16), torch.ones(8, device=device)
    assert rms_norm(x, weight, cast="llama").dtype == torch.float32
    assert rms_norm(x, weight, cast="gemma", offset=1.0).dtype == torch.bfloat16


def test_inputs_and_upstream_gradient_stay_unchanged(device, path):
    """The gradient of a norm's output is also the residual's (Gemma2's second norm): it must not be overwritten."""
    x = torch.randn(7, 40, device=device, requires_grad=True)
    weight = torch.rand(40, device=device, requires_grad=True)
    dy = torch.randn(7, 40, device=device)
    before = [t.detach().clone() for t in (x, weight, dy)]
    y = rms_norm(x, weight)
    y.backward(dy, retain_graph=True)
    first = x.grad.clone()
    y.backward(dy)
    for tensor, kept in zip((x, weight, dy), before, strict=True):
        assert torch.equal(tensor.detach(), kept)
    torch.testing.assert_close(x.grad, 2 * first)


def test_frozen_weight_gets_no_gradient(device, path):
    x = torch.randn(3, 16, device=device, requires_grad=True)
    weight = torch.ones(16, device=device)
    rms_norm(x, weight).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_same_bits_every_time(device, path):
    x = torch.randn(700, 64, device=device, requires_grad=True)
    weight = torch.rand(64, device=device, requires_grad=True)
    dy = torch.randn(700, 64, device=device)
    runs = [torch.autograd.grad(rms_norm(x, weight), (x, weight), dy) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivative_of_chosen_tensors_is_refused_not_left_out(device, frozen):
    x, weight = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((3, 6), (6,)))
    (dx,) = torch.autograd.grad(rms_norm(x, weight.detach() if frozen else weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(dx.square().sum(), x)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (dx.square().sum() + x.sum()).backward(inputs=[x])
    if not frozen:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(dx.square().sum() + weight.sum(), weight)


def test_second_derivative_is_refused_not_wrong(device):
    x = torch.randn(2, 8, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(rms_norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(2, 8, dtype=torch.int64), {}, TypeError, "floating-point dtype, not torch.int64"),
        (torch.ones(2, 8), {"weight": torch.ones(7)}, ValueError, r"weight has shape \(7,\), expected .* \(8,\)"),
        (torch.ones(2, 8), {"weight": torch.ones(8, device="meta")}, ValueError, "weight is on meta"),
        (torch.tensor(1.0), {}, ValueError, "x has no dimension"),
        (torch.ones(2, 8), {"cast": "qwen"}, ValueError, "must be 'llama' or 'gemma', not 'qwen'"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, **options)
