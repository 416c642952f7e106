"""What traces an op gets a graph that holds for other numbers too."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from liger.ops import cross_entropy, layer_norm, linear_cross_entropy, linear_distillation, linear_log_prob

pytestmark = pytest.mark.usefixtures("no_interpreter")


def scaled(x, weight, target):
    """Each loss, of a scale of the logits."""
    return {
        "cross_entropy": lambda scale: cross_entropy(x, target, logit_scale=scale),
        "linear_cross_entropy": lambda scale: linear_cross_entropy(x, weight, target, logit_scale=scale),
        "linear_log_prob": lambda scale: linear_log_prob(x, weight, target, logit_scale=scale)[0],
        "linear_distillation": lambda scale: linear_distillation(x, weight, x + 1, weight, student_logit_scale=scale),
    }


@pytest.mark.parametrize("name", scaled(None, None, None))
def test_another_scale_needs_no_graph_break(device, name):
    torch._dynamo.reset()
    x, weight = torch.randn(6, 8, device=device), torch.randn(30, 8, device=device)
    loss = scaled(x, weight, torch.randint(8, (6,), device=device))[name]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (0.7, 0.9, 1.1):
        torch.testing.assert_close(compiled(scale), loss(scale))


class Norm(nn.Module):
    def forward(self, x, target):
        return layer_norm(x, x[0])


class Loss(nn.Module):
    def forward(self, x, target):
        return linear_cross_entropy(x, x[:1].expand(5, -1), target)


@pytest.mark.parametrize("module", [Norm(), Loss()], ids=["layer_norm", "linear_cross_entropy"])
def test_an_exported_graph_takes_any_number_of_rows(device, module):
    def inputs(rows):
        return torch.randn(rows, 8, device=device), torch.randint(5, (rows,), device=device)

    rows = {0: Dim("rows", min=2)}
    exported = torch.export.export(module, inputs(6), dynamic_shapes=(rows, rows)).module()
    for count in (2, 6, 100):
        given = inputs(count)
        torch.testing.assert_close(exported(*given), module(*given))
