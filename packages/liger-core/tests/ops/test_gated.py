"""swiglu and geglu against fp64, through the kernels and through the references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from liger.ops import gated, geglu, geglu_joined, swiglu, swiglu_joined
from liger.testing import assert_as_exact_as
from liger.testing.error_rule import relative_error

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]
SHAPES = [(), (1,), (3, 7), (2, 5, 64), (2, 2048), (3, 1, 1500)]
ACTIVATIONS = {
    "silu": (swiglu, F.silu),
    "gelu-tanh": (geglu, lambda x: F.gelu(x, approximate="tanh")),
    "gelu-erf": (lambda gate, up: geglu(gate, up, "none"), F.gelu),
}


@pytest.fixture(params=ACTIVATIONS)
def op(request):
    """The op, and its activation in torch."""
    return ACTIVATIONS[request.param]


def check(op, gate, up, dy) -> None:
    """Output and gradients obey the error rule against torch in fp32, rounded once: nothing is rounded on the way."""
    function, activation = op

    def run(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        y = f(*leaves)
        return [y, *torch.autograd.grad(y, leaves, dy.to(dtype))]

    def in_torch(gate, up):
        return activation(gate) * up

    for name, actual, own, exact in zip(
        ("y", "dgate", "dup"), run(function, gate.dtype), run(in_torch, torch.float32), run(in_torch, torch.float64),
        strict=True,
    ):  # fmt: skip
        assert_as_exact_as(actual, own.to(gate.dtype), exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_fp64(device, path, op, dtype, shape):
    gate, up, dy = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    check(op, gate, up, dy)


@pytest.mark.parametrize("shape", [(3, 600), (2, 3, 192), (1, 3, 5000), (3, 1, 4096), (4, 2)], ids=str)
def test_halves_of_one_projection_match_and_are_not_copied(device, path, op, shape, monkeypatch):
    """Phi3's gate_up.chunk(2, -1): rows with a stride."""
    function, activation = op
    gate_up = torch.randn(shape, device=device, requires_grad=True)
    dy = torch.randn(*shape[:-1], shape[-1] // 2, device=device)
    copies = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: copies.append(t.is_contiguous()) or contiguous(t))
    y = function(*gate_up.chunk(2, -1))
    (dx,) = torch.autograd.grad(y, gate_up, dy)
    assert all(copies)
    monkeypatch.undo()
    exact = gate_up.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    expected = activation(gate) * up
    (exact_dx,) = torch.autograd.grad(expected, exact, dy.double())
    assert_as_exact_as(y, expected.float(), expected, "y")
    assert_as_exact_as(dx, exact_dx.float(), exact_dx, "dx")


JOINED = {
    "silu": (swiglu_joined, F.silu),
    "gelu-tanh": (geglu_joined, lambda x: F.gelu(x, approximate="tanh")),
    "gelu-erf": (lambda gate_up: geglu_joined(gate_up, "none"), F.gelu),
}


@pytest.fixture(params=JOINED)
def joined(request):
    """The op of one tensor, and its activation in torch."""
    return JOINED[request.param]


def check_joined(joined, gate_up, dy) -> None:
    """As `check`, for one tensor and its one gradient."""
    function, activation = joined

    def run(f, dtype):
        leaf = gate_up.detach().to(dtype).requires_grad_()
        y = f(leaf)
        return [y, *torch.autograd.grad(y, leaf, dy.to(dtype))]

    def in_torch(x):
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    three = run(function, gate_up.dtype), run(in_torch, torch.float32), run(in_torch, torch.float64)
    for name, actual, own, exact in zip(("y", "d gate_up"), *three, strict=True):
        assert actual.dtype == gate_up.dtype
        assert_as_exact_as(actual, own.to(gate_up.dtype), exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (3, 14), (2, 5, 128), (2, 4100), (3, 1, 1500), (0, 8), (3, 0)], ids=str)
def test_joined_matches_fp64(device, path, joined, dtype, shape):
    gate_up = torch.randn(shape, device=device).to(dtype)
    check_joined(joined, gate_up, torch.randn(*shape[:-1], shape[-1] // 2, device=device).to(dtype))


@pytest.mark.parametrize("case", ["slice of columns", "padded batches", "transposed", "expanded", "upstream"])
def test_joined_of_other_strides(device, path, joined, case):
    gate_up, dy = torch.randn(4, 6, 64, device=device), torch.randn(4, 6, 32, device=device)
    if case == "slice of columns":
        gate_up = torch.randn(4, 6, 100, device=device)[..., 20:84]
    elif case == "padded batches":
        gate_up, dy = gate_up[:, 1:], dy[:, 1:]
    elif case == "transposed":
        gate_up, dy = gate_up.transpose(0, 1), dy.transpose(0, 1)
    elif case == "expanded":
        gate_up = gate_up[:1, :1].expand(4, 6, 64)
    else:
        dy = dy[..., :1].expand(4, 6, 32)
    check_joined(joined, gate_up, dy)


@pytest.mark.parametrize(
    ("gate_up", "error", "message"),
    [
        (torch.ones(2, 8).long(), TypeError, "gate_up must have a floating-point dtype, not torch.int64"),
        (torch.ones(2, 7), ValueError, r"gate_up has shape \(2, 7\), expected an even last dimension"),
        (torch.ones(()), ValueError, r"gate_up has shape \(\), expected an even last dimension"),
    ],
)
@pytest.mark.parametrize("op", [swiglu_joined, geglu_joined], ids=lambda op: op.__name__)
def test_joined_refuses_by_name(op, gate_up, error, message):
    with pytest.raises(error, match=f"{op.__name__}: {message}"):
        op(gate_up)


def test_geglu_joined_refuses_an_unknown_approximation():
    with pytest.raises(ValueError, match="geglu_joined: approximate must be 'tanh' or 'none', not 'erf'"):
        geglu_joined(torch.ones(2, 8), "erf")


@pytest.mark.parametrize(
    ("size", "stride", "expected"),
    [
        ((3, 4), (4, 1), 4),
        ((3, 4), (8, 1), 8),
        ((3, 4), (0, 1), 0),
        ((2, 3, 4), (24, 8, 1), 8),
        ((2, 1, 4), (8, 77, 1), 8),
        ((1, 1, 4), (5, 77, 1), 4),
        ((4,), (1,), 4),
        ((3, 4), (1, 3), None),
        ((2, 3, 4), (8, 16, 1), None),
        ((2, 3, 4), (30, 8, 1), None),
    ],
)
def test_row_stride(size, stride, expected):
    assert gated._row_stride(torch.empty(0).new_empty(200).as_strided(size, stride)) == expected


@pytest.mark.parametrize("case", ["transposed", "padded batches", "one of two strided", "expanded"])
def test_other_strides(device, path, op, case):
    gate, up, dy = (torch.randn(4, 6, 32, device=device) for _ in range(3))
    if case == "transposed":
        gate, up = gate.transpose(0, 1), up.transpose(0, 1)
    elif case == "padded batches":
        gate, up = gate[:, :5], up[:, 1:]
    elif case == "one of two strided":
        up = torch.randn(4, 6, 80, device=device)[..., 48:]
    else:
        gate, up = gate[:1, :1].expand(4, 6, 32), up[:, :1].expand(4, 6, 32)
    check(op, gate, up, dy.expand(4, 6, 32).reshape(-1)[: gate.numel()].view(gate.shape))


def test_the_tanh_gelus_derivative_keeps_its_digits_where_it_is_near_one(device, path):
    gate = torch.linspace(3, 6, 999, device=device, requires_grad=True)
    (dgate,) = torch.autograd.grad(geglu(gate, torch.ones_like(gate)).sum(), gate)
    exact = gate.detach().double().requires_grad_()
    (derivative,) = torch.autograd.grad(F.gelu(exact, approximate="tanh").sum(), exact)
    assert relative_error(dgate, derivative) < (1e-7 if path == "kernel" else 4e-7)


def test_extreme_gates_are_finite_and_exact(device, path, op):
    """exp overflows far below the largest gate; no NaN may come of it."""
    gate = torch.tensor([-6e4, -1e3, -89.0, -20.0, -0.0, 0.0, 20.0, 89.0, 1e3, 6e4], device=device)
    check(op, gate, torch.ones_like(gate), torch.ones_like(gate))


def test_nan_and_infinity_are_passed_on(device, path, op):
    gate = torch.tensor([torch.nan, 1.0, 1.0, -1.0], device=device)
    up = torch.tensor([1.0, torch.nan, torch.inf, torch.inf], device=device)
    y = op[0](gate, up)
    assert y.isnan().tolist() == [True, True, False, False]
    assert y[2:].tolist() == [torch.inf, -torch.inf]


@pytest.mark.parametrize(("frozen", "flag"), [(0, "NEEDS_DGATE"), (1, "NEEDS_DUP")])
def test_frozen_half_gets_no_gradient_work(device, op, frozen, flag, monkeypatch):
    pytest.importorskip("triton")
    asked = []
    launch = gated.launch
    monkeypatch.setattr(gated, "launch", lambda *a, **options: asked.append(options) or launch(*a, **options))
    inputs = [torch.randn(3, 8, device=device, requires_grad=i != frozen) for i in range(2)]
    op[0](*inputs).sum().backward()
    assert [options.get(flag) for options in asked] == [None, False]


def test_fp64_stays_fp64(device, op):
    function, activation = op
    gate, up = torch.randn(2, 4, 9, device=device, dtype=torch.float64)
    assert torch.equal(function(gate, up), activation(gate) * up)


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
@pytest.mark.parametrize(
    ("gate", "up", "error", "message"),
    [
        (torch.ones(2, 8).long(), torch.ones(2, 8).long(), TypeError, "floating-point dtype, not torch.int64"),
        (torch.ones(2, 8), torch.ones(2, 8).half(), TypeError, "up has dtype torch.float16, expected .*float32"),
        (torch.ones(2, 8), torch.ones(1, 8), ValueError, r"up has shape \(1, 8\), expected gate's \(2, 8\)"),
        (torch.ones(2, 8), torch.ones(2, 8, device="meta"), ValueError, "up is on meta, expected gate's device cpu"),
    ],
)
def test_bad_input_is_named(name, gate, up, error, message):
    with pytest.raises(error, match=f"{name}: .*{message}"):
        {"swiglu": swiglu, "geglu": geglu}[name](gate, up)


def test_unknown_approximation_is_named():
    with pytest.raises(ValueError, match="geglu: approximate must be 'tanh' or 'none', not 'erf'"):
        geglu(torch.ones(2), torch.ones(2), "erf")
