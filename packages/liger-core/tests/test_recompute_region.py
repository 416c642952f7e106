"""What a region of recompute packs, and what it lets go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from liger import recompute
from liger.ops import rms_norm
from recomputing import Allocated, assert_equal

pytestmark = pytest.mark.usefixtures("no_interpreter")


def test_a_parameter_is_kept_itself_and_not_an_alias_of_its_data():
    """ZeRO-3 gives a parameter other data between forward and backward."""
    region = recompute._Region()
    weight = nn.Parameter(torch.ones(3))
    assert region.pack(weight).tensor is weight
    result = weight.exp()
    assert region.pack(result).tensor is not result


def in_region(model):
    """A module's call inside a region."""
    return recompute.forward_in_region(lambda self, *args: self(*args)).__get__(model)


def test_a_recipe_keeps_nothing_alive_that_autograd_lets_go(device):
    """A norm of a part of a wide tensor copies it: the copy is kept, and the wide tensor must not be."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.out = nn.Linear(8, 64, device=device), nn.Linear(8, 8, device=device)
            self.weight = nn.Parameter(torch.ones(8, device=device))

        def forward(self, x):
            part = self.wide(x)[..., 8:16]
            return self.out(recompute.rebuildable(rms_norm, part, self.weight, 1e-6))

    module, x = Part(), torch.randn(5, 8, device=device)
    sizes = []
    for call in (module, in_region(module)):
        with Allocated() as allocated:
            y = call(x)
        sizes.append(allocated.alive())
        del y
    assert sizes[1] <= sizes[0]


def test_a_freed_output_is_never_taken_for_a_new_tensor(device):
    """The output dies unused; others of its shape come to lie where it lay, in memory and among Python's objects."""

    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 3.0, device=device))

        def forward(self, x):
            for _ in range(50):
                recompute.rebuildable(rms_norm, x, self.weight, 1e-6)
                x = (x * 1.01).sin() * (x + 1)
            return x

    module, results = Reusing(), []
    for call in (module, in_region(module)):
        x = torch.linspace(-1, 1, 40, device=device).view(5, 8).requires_grad_()
        results.append(torch.autograd.grad(call(x * 1).sum(), [x]))
    assert_equal(*results)


def test_views_and_dead_names(device):
    """Parts of an output, transposed, after its own name is gone."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(1, 2, 8, device=device))
            self.one, self.two = nn.Linear(4, 3, device=device), nn.Linear(5, 3, device=device)

        def forward(self, x):
            y = recompute.rebuildable(rms_norm, x, self.weight, 1e-6)
            left, turned = y[:, 4:], y.t()
            del y
            return self.one(left).sum() + self.two(turned).sum() + left.t().exp().sum() + (turned * turned).sum()

    module, results = Views(), []
    for call in (module, in_region(module)):
        x = torch.linspace(-1, 1, 40, device=device).view(5, 8).requires_grad_()
        results.append(torch.autograd.grad(call(x * 1), [x, *module.parameters()]))
    assert_equal(*results)
