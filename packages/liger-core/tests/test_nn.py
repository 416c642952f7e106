"""The modules: the op they call, the parameters they own and how these are named and begin."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from liger import nn, ops
from liger.testing import assert_as_exact_as


def as_exact_as_in_torch(module, function, *inputs) -> None:
    """Output and gradients of `module` obey the error rule against `function(parameters, *inputs)` in torch."""

    def run(call, dtype=torch.float32):
        parameters = {n: p.detach().to(dtype).requires_grad_() for n, p in module.named_parameters()}
        given = [t.detach().to(dtype).requires_grad_() if t.is_floating_point() else t for t in inputs]
        y = call(parameters, *given)
        leaves = [*parameters.values(), *(t for t in given if t.is_floating_point())]
        torch.manual_seed(0)
        return [y, *torch.autograd.grad(y, leaves, torch.randn(y.shape, device=y.device).to(dtype))]

    def through_module(parameters, *given):
        return torch.func.functional_call(module, parameters, given)

    for actual, own, exact in zip(run(through_module), run(function), run(function, torch.float64), strict=True):
        assert_as_exact_as(actual, own, exact)


@pytest.mark.parametrize(("offset", "cast"), [(0.0, "llama"), (1.0, "gemma")])
def test_rms_norm(device, path, offset, cast):
    module = nn.RMSNorm(24, eps=1e-5, offset=offset, cast=cast, device=device)
    assert list(module.state_dict()) == ["weight"]
    assert torch.equal(module.weight, torch.full((24,), 1.0 - offset, device=device))
    torch.nn.init.normal_(module.weight)
    as_exact_as_in_torch(
        module, lambda p, x: F.rms_norm(x, (24,), offset + p["weight"], 1e-5), torch.randn(3, 24, device=device)
    )


@pytest.mark.parametrize(
    ("affine", "bias", "names"), [(True, True, ["weight", "bias"]), (True, False, ["weight"]), (False, True, [])]
)
def test_layer_norm(device, path, affine, bias, names):
    module = nn.LayerNorm(24, elementwise_affine=affine, bias=bias, device=device)
    assert list(module.state_dict()) == names
    module.load_state_dict(torch.nn.LayerNorm(24, elementwise_affine=affine, bias=bias).state_dict())
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    as_exact_as_in_torch(
        module, lambda p, x: F.layer_norm(x, (24,), p.get("weight"), p.get("bias")), torch.randn(3, 24, device=device)
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("make", "activation"),
    [
        (nn.SwiGLU, F.silu),
        (nn.GEGLU, lambda x: F.gelu(x, approximate="tanh")),
        (lambda *a, **k: nn.GEGLU(*a, approximate="none", **k), F.gelu),
    ],
)
def test_gated_mlps(device, path, make, activation, bias):
    module = make(8, 12, bias=bias, device=device)
    kinds = ("weight", "bias") if bias else ("weight",)
    assert list(module.state_dict()) == [f"{n}_proj.{kind}" for n in ("gate", "up", "down") for kind in kinds]

    def in_torch(p, x):
        gate, up = (F.linear(x, p[f"{n}_proj.weight"], p.get(f"{n}_proj.bias")) for n in ("gate", "up"))
        return F.linear(activation(gate) * up, p["down_proj.weight"], p.get("down_proj.bias"))

    as_exact_as_in_torch(module, in_torch, torch.randn(3, 8, device=device))


OPTIONS = {"ignore_index": 3, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 0.5}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_passes_every_option_on(device, path, reduction):
    logits, target = torch.randn(6, 11, device=device) * 9, torch.tensor([0, 1, 3, 3, 10, 5], device=device)
    module = nn.CrossEntropyLoss(**OPTIONS, reduction=reduction)
    assert not list(module.parameters())
    loss = module(logits, target)
    torch.testing.assert_close(loss, ops.cross_entropy(logits, target, **OPTIONS, reduction=reduction))
    for name in OPTIONS:  # each matters here, so that one left out would be seen
        fewer = {key: value for key, value in OPTIONS.items() if key != name}
        assert not torch.allclose(loss, ops.cross_entropy(logits, target, **fewer, reduction=reduction))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_cross_entropy_owns_its_head(device, path, reduction, bias):
    module = nn.LinearCrossEntropyLoss(16, 11, bias=bias, **OPTIONS, reduction=reduction, device=device)
    assert list(module.state_dict()) == (["linear.weight", "linear.bias"] if bias else ["linear.weight"])
    torch.nn.init.normal_(module.linear.weight)
    hidden = torch.randn(6, 16, device=device, requires_grad=True)
    target = torch.tensor([0, 1, 3, 3, 10, 5], device=device)
    loss = module(hidden, target)
    expected = ops.cross_entropy(module.linear(hidden), target, **OPTIONS, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    leaves = [hidden, *module.parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(loss.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_a_denominator_replaces_the_count(device, path):
    module = nn.LinearCrossEntropyLoss(16, 11, reduction="sum", device=device)
    hidden, target = torch.randn(4, 16, device=device), torch.tensor([1, 2, -100, 4], device=device)
    torch.testing.assert_close(module(hidden, target, torch.tensor(8, device=device)), module(hidden, target) / 8)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (nn.RMSNorm(8, offset=1.0, cast="gemma"), "8, eps=1e-06, elementwise_affine=True, offset=1.0, cast='gemma'"),
        (nn.RMSNorm(8, elementwise_affine=False), "8, eps=1e-06, elementwise_affine=False, offset=0.0, cast='llama'"),
        (nn.LayerNorm(8, bias=False), "8, eps=1e-05, elementwise_affine=True, bias=False"),
        (nn.GEGLU(2, 3), "activation='gelu', approximate='tanh'"),
        (nn.SwiGLU(2, 3), "activation='silu'"),
        (
            nn.CrossEntropyLoss(softcap=30.0),
            "ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=30.0, logit_scale=1.0, reduction='mean'",
        ),
        (nn.LinearCrossEntropyLoss(2, 3, z_loss=0.5), "z_loss=0.5"),
    ],
)
def test_repr_says_the_settings(module, text):
    assert text in repr(module)


def test_parameters_have_the_dtype_and_device_asked_for():
    for module in (
        nn.RMSNorm(4, device="meta", dtype=torch.bfloat16),
        nn.LayerNorm(4, device="meta", dtype=torch.bfloat16),
        nn.SwiGLU(4, 4, device="meta", dtype=torch.bfloat16),
        nn.GEGLU(4, 4, bias=True, device="meta", dtype=torch.bfloat16),
        nn.LinearCrossEntropyLoss(4, 4, bias=True, device="meta", dtype=torch.bfloat16),
    ):
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_import_needs_no_hugging_face_library():
    program = "import liger.nn, sys; print([m for m in ('transformers', 'accelerate', 'peft') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
