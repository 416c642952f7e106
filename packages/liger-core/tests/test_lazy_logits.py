"""Lazy logits: a tensor to all who ask, computed once, when somebody first reads it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from liger.lazy_logits import LazyLogits


@pytest.fixture
def made():
    """(lazy, the list of times it was computed, the leaf that the values depend on)."""
    leaf = torch.arange(6.0).view(2, 3).requires_grad_()
    calls = []

    def compute():
        calls.append(1)
        return leaf * 2

    return LazyLogits(compute, torch.Size((2, 3)), torch.float32, torch.device("cpu")), calls, leaf


def test_metadata_and_unasked_conversions_compute_nothing(made):
    lazy, calls, _ = made
    assert isinstance(lazy, torch.Tensor)
    assert torch.is_tensor(lazy)
    assert lazy.shape == (2, 3)
    assert lazy.size(-1) == 3
    assert (lazy.ndim, lazy.dim(), lazy.numel(), lazy.dtype) == (2, 2, 6, torch.float32)
    assert lazy.device.type == "cpu"
    assert not lazy.requires_grad
    assert lazy.bfloat16().dtype == torch.bfloat16
    assert lazy.detach().float().shape == (2, 3)
    assert "LazyLogits(shape=(2, 3)" in repr(lazy)
    assert not calls


def test_conversions_are_those_of_the_values(made):
    lazy, _, leaf = made
    assert torch.equal(lazy.bfloat16() + 0, (leaf * 2).bfloat16())
    assert lazy.half().half().float().sum().dtype == torch.float32
    assert not (lazy.detach() + 0).requires_grad


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 0,
        lambda x: torch.softmax(x, -1),
        lambda x: x[..., :-1, :],
        lambda x: x.argmax(-1),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor([0, 2])),
        lambda x: torch.cat([x, x]),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy().tolist(),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        lambda x: x.to("cpu", torch.float64),
    ],
)
def test_every_use_sees_the_values(made, use):
    lazy, calls, leaf = made
    result, expected = use(lazy), use(leaf * 2)
    if isinstance(expected, torch.Tensor):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    else:
        assert result == expected
    use(lazy)
    assert len(calls) == 1


def test_gradients_reach_what_the_logits_came_from(made):
    lazy, _, leaf = made
    lazy.square().sum().backward()
    assert torch.equal(leaf.grad, 8 * leaf.detach())


def test_the_dispatcher_is_a_second_net(made):
    """What passes by torch functions (C++ callers, autograd Functions) still meets values, not an empty shell."""
    lazy, calls, _ = made
    assert torch.equal(torch.ops.aten.add.Tensor(lazy, 1), torch.arange(6.0).view(2, 3) * 2 + 1)
    assert calls
