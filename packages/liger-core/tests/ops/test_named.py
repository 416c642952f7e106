"""The profiler shows every op under its public name, forward and backward, and nothing is run for that."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.profiler import profile

from liger import ops
from liger.ops.named import named


@pytest.fixture
def one_rank(device):
    """A process group of this process alone."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh(device.type, (1,))
    dist.destroy_process_group()


def inputs_of(op, device):
    """Arguments of the op, small ones."""

    def tensor(*shape):
        return torch.randn(*shape, device=device, requires_grad=True)

    x, weight, target = tensor(2, 8), tensor(9, 8), torch.tensor([3, -100], device=device)
    q, k = tensor(1, 2, 3, 16), tensor(1, 1, 3, 16)
    angles = torch.randn(1, 3, 16, device=device)
    cos, sin = angles.cos(), angles.sin()
    return {
        "add_rms_norm": (x, tensor(2, 8), tensor(8)),
        "cross_entropy": (tensor(2, 9), target),
        "geglu": (x, tensor(2, 8)),
        "geglu_joined": (x,),
        "layer_norm": (x, tensor(8), tensor(8)),
        "linear_cross_entropy": (x, weight, target),
        "linear_distillation": (x, weight, torch.randn(2, 4, device=device), torch.randn(9, 4, device=device), target),
        "linear_log_prob": (x, weight, target),
        "qk_norm_rotary": (q, k, tensor(16), tensor(16), cos, sin),
        "rms_norm": (x, tensor(8)),
        "rotary": (q, k, cos, sin),
        "rotary_one": (q, cos, sin),
        "swiglu": (x, tensor(2, 8)),
        "swiglu_joined": (x,),
        "vocab_parallel_linear_cross_entropy": (x, weight, target),
    }[op]


@pytest.mark.parametrize("op", ops.__all__)
def test_each_op_has_a_range_of_its_name_in_forward_and_in_backward(op, device, request):
    arguments = inputs_of(op, device)
    if op == "vocab_parallel_linear_cross_entropy":
        x, weight, target = arguments
        arguments = (x, distribute_tensor(weight, request.getfixturevalue("one_rank"), [Shard(0)]), target)
    if op == "qk_norm_rotary":
        arguments = tuple(t.transpose(1, 2) if t.dim() == 4 else t for t in arguments)
    with profile() as recorded:
        outputs = getattr(ops, op)(*arguments)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        first.sum().backward()
    names = [event.name for event in recorded.events() if event.name.startswith("liger::")]
    assert names == [f"liger::{op}", f"liger::{op}Backward"]


class Square(torch.autograd.Function):
    """Squares."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return 2 * x * dy


def test_a_name_is_all_that_is_added():
    """The launch path is measured in microseconds."""
    square = named("square")(Square)
    for method in ("forward", "backward"):
        assert getattr(square, method) is getattr(Square, method)
    assert square.apply.__func__ is Square.apply.__func__
    assert (square.__name__, square.__module__, square.__doc__) == ("liger::square", __name__, "Squares.")


def test_it_compiles_as_one_graph():
    square = named("square")(Square)
    compiled = torch.compile(lambda x: square.apply(x).sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, requires_grad=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
