"""A second derivative of what has none is an error, never zero; and a first one builds no graph."""

from __future__ import annotations

import pytest
import torch

from liger.ops.once_differentiable import once_differentiable

graphs = []


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        graphs.append(torch.is_grad_enabled())
        return 2 * x * dy


@pytest.mark.parametrize("create_graph", [False, True])
def test_the_first_derivative_is_computed_without_gradients(create_graph):
    graphs.clear()
    x = torch.tensor(3.0, requires_grad=True)
    (dx,) = torch.autograd.grad(Square.apply(x), x, create_graph=create_graph)
    assert dx.item() == 6
    assert graphs == [False]


@pytest.mark.parametrize("after", [torch.exp, torch.clone], ids=["upstream with a graph", "constant upstream"])
def test_the_second_derivative_is_refused(after):
    x = torch.tensor(3.0, requires_grad=True)
    y = after(Square.apply(x))
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (y + dx.square()).backward()  # a gradient penalty
