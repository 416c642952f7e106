"""The gated norm of a linear attention's output."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from liger.testing import assert_as_exact_as
from liger_qwen.gated_rms_norm import GatedRMSNorm

LAYER = GatedRMSNorm()


def module(device, dtype):
    norm = Qwen3NextRMSNormGated(24, eps=1e-2)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.3, 2, 24))
    return norm.to(device=device, dtype=dtype)


def results(norm, x, gate):
    x, gate = x.clone().requires_grad_(), gate.clone().requires_grad_()
    y = norm(x, gate)
    upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [x, gate, norm.weight], upstream)]


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["fp32", "bf16", "bf16-fp32-weight"],
)
def test_output_and_all_gradients(device, path, dtype, weight_dtype):
    torch.manual_seed(0)
    x, gate = (torch.randn(13, 24).to(device=device, dtype=dtype) for _ in range(2))
    stock = module(device, weight_dtype)
    ours = copy.deepcopy(stock)
    ours.forward = functools.partial(LAYER.forward, ours)
    exact = copy.deepcopy(stock).double()
    triples = zip(
        results(ours, x, gate), results(stock, x, gate), results(exact, x.double(), gate.double()), strict=True
    )
    for name, triple in zip(["y", "dx", "dgate", "dweight"], triples, strict=True):
        assert triple[0].dtype == triple[1].dtype
        assert_as_exact_as(*triple, name)


@pytest.mark.parametrize(
    ("attribute", "value", "reason"),
    [
        ("activation", "gelu", "activation='gelu' has no kernel (known: silu, swish)"),
        ("variance_epsilon", None, "has no float attribute 'variance_epsilon'"),
        ("bias", torch.nn.Parameter(torch.zeros(24)), "has parameters that GatedRMSNorm does not know: bias"),
    ],
)
def test_what_it_does_not_know_is_declined(device, attribute, value, reason):
    norm = module(device, torch.float32)
    assert LAYER.declines(norm) is None
    setattr(norm, attribute, value)
    assert LAYER.declines(norm) == reason
