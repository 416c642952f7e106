"""The loss of a head whose vocabulary lies on the ranks: the op alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from data_parallel import ON
from liger.ops import launch, linear_chunks, linear_cross_entropy, vocab_parallel_linear_cross_entropy
from liger.testing.parity import assert_each_as_exact_as
from pair import DEVICE, WORLD, Case, skip_alone

CASES: dict[str, Case] = {}
CLASSES, ROWS, H = 101, 9, 8  # the classes lie on the ranks in unequal parts
IGNORED = [0, 5]


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The same on every rank."""
    target = torch.randint(CLASSES, (ROWS,))
    target[IGNORED] = -100
    named = {"x": torch.randn(ROWS, H), "weight": torch.randn(CLASSES, H) / 2, "bias": torch.randn(CLASSES)}
    return {**{name: value.to(ON, dtype) for name, value in named.items()}, "target": target.to(ON)}


def sharded(tensor: Tensor) -> DTensor:
    return distribute_tensor(tensor, init_device_mesh(DEVICE, (WORLD,)), [Shard(0)])


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def step(given: dict[str, Tensor], loss_of: Callable[..., Tensor], place: Callable[[Tensor], Any]) -> list[Tensor]:
    x, weight, bias = (given[name].clone() for name in ("x", "weight", "bias"))
    leaves = [x.requires_grad_(), place(weight).requires_grad_(), place(bias).requires_grad_()]
    loss = loss_of(*leaves, given["target"])
    loss.backward()
    return [loss.detach(), *(whole(leaf.grad) for leaf in leaves)]


def ours(x: Tensor, weight: Any, bias: Any, target: Tensor, **options: Any) -> Tensor:
    return vocab_parallel_linear_cross_entropy(x, weight, target, linear_bias=bias, **options)


def own(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, *, reduction: str = "mean", denominator: float = 1.0,
    softcap: float | None = None, logit_scale: float = 1.0, z_loss: float = 0.0,
) -> Tensor:  # fmt: skip
    """Torch's own of the whole logits."""
    logits = F.linear(x, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z, target, reduction="sum") + z_loss * z[target != -100].logsumexp(-1).square().sum()
    return loss / ((target != -100).sum() if reduction == "mean" else denominator)


OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum over a denominator": {"reduction": "sum", "denominator": 7.0},
    "softcap": {"softcap": 2.0},
    "scale and z-loss": {"logit_scale": 0.5, "z_loss": 0.1},
}


def small_chunks(path: str) -> None:
    """Two chunks: one may take what dW takes, which is 8 rows."""
    launch.enabled = path == "kernel"
    linear_chunks.CHUNK_BYTES = 1


def matches_fp64(path: str, dtype: torch.dtype, option: str) -> None:
    small_chunks(path)
    given, options = tensors(dtype), OPTIONS[option]
    exact = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    results = (
        step(given, partial(ours, **options), sharded),
        step(given, partial(own, **options), lambda tensor: tensor),
        step(exact, partial(own, **options), lambda tensor: tensor),
    )
    assert_each_as_exact_as(dict(zip(("loss", "dx", "dW", "db"), zip(*results, strict=True), strict=True)))


for _path in ("kernel", "reference"):
    for _dtype in (torch.float32, torch.bfloat16, torch.float16):
        for _option in OPTIONS:
            _name = f"op, {_path}, {str(_dtype).removeprefix('torch.')}, {_option}"
            CASES[_name] = partial(matches_fp64, _path, _dtype, _option)


def three_numbers() -> None:
    """What crosses between the ranks is three numbers of each row in forward, and dx in backward."""
    small_chunks("reference")
    given, sent = tensors(), []
    gather, reduce = dist.all_gather_into_tensor, dist.all_reduce
    dist.all_gather_into_tensor = lambda out, tensor, **kw: (sent.append(tensor.numel()), gather(out, tensor, **kw))
    dist.all_reduce = lambda tensor, **kw: (sent.append(tensor.numel()), reduce(tensor, **kw))
    x, weight = given["x"].requires_grad_(), sharded(given["weight"]).requires_grad_()
    try:
        vocab_parallel_linear_cross_entropy(x, weight, given["target"]).backward()
    finally:
        dist.all_gather_into_tensor, dist.all_reduce = gather, reduce
    *numbers, dx = sent
    assert len(numbers) > 1, "there was one chunk only"
    assert (sum(numbers), dx) == (3 * ROWS, ROWS * H)


def same_everywhere() -> None:
    """Loss and dx have the same bits on every rank, or the replicas of what lies before the head drift apart."""
    small_chunks("reference")
    loss, dx, *_ = step(tensors(), ours, sharded)
    for value in (loss, dx):
        every = [torch.empty_like(value) for _ in range(WORLD)]
        dist.all_gather(every, value)
        assert all(torch.equal(every[0], other) for other in every)


def second_backward() -> None:
    small_chunks("kernel")
    given = tensors()
    leaves = given["x"].requires_grad_(), sharded(given["weight"]).requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(*leaves, given["target"])
    first, second = (torch.autograd.grad(2 * loss, leaves, retain_graph=True) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(whole(one), whole(other), rtol=1e-5, atol=1e-7)


def labels() -> None:
    """All ignored: 0 with a denominator; ignored is what says so, whatever number a rank gives its first label."""
    small_chunks("kernel")
    given = tensors()
    x, weight, bias = given["x"].requires_grad_(), sharded(given["weight"]), sharded(given["bias"])
    nothing = torch.full_like(given["target"], -100)
    loss = ours(x, weight, bias, nothing, reduction="sum", denominator=4.0)
    loss.backward()
    assert loss == 0
    assert not x.grad.any()
    for ignored in (-1, 0, 50, 51, 100):
        target = given["target"].clamp(min=0)
        expected = F.cross_entropy(F.linear(x, given["weight"], given["bias"]), target, ignore_index=ignored)
        torch.testing.assert_close(ours(x, weight, bias, target, ignore_index=ignored), expected)


def part_of_minus_infinity() -> None:
    """A rank whose columns are all -inf, as a padded vocabulary's are."""
    for path in ("kernel", "reference"):
        small_chunks(path)
        given = tensors()
        given["bias"][CLASSES // 2 + 1 :] = -torch.inf
        given["target"] %= CLASSES // 2
        results = step(given, ours, sharded), step(given, own, lambda tensor: tensor)
        for mine, expected in zip(*results, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def refuses() -> None:
    skip_alone()
    given, mesh = tensors(), init_device_mesh(DEVICE, (WORLD,))
    x, weight, target = given["x"], given["weight"], given["target"]
    columns = distribute_tensor(weight, mesh, [Shard(1)])
    halves = distribute_tensor(torch.cat([x] * WORLD), mesh, [Shard(0)])
    few = sharded(weight[:1])
    for message, call in {
        "linear_weight is a DTensor": lambda: linear_cross_entropy(x, sharded(weight), target),
        "its weight is no DTensor": lambda: ours(x, weight, None, target),
        "its weight is placed S(1), not Shard(0)": lambda: ours(x, columns, None, target),
        "its bias is no DTensor": lambda: ours(x, sharded(weight), given["bias"], target),
        "its 1 rows are too few for": lambda: ours(x, few, None, target * 0),
        "not replicated": lambda: ours(halves, sharded(weight), None, target),
        "reduction must be 'mean' or 'sum'": lambda: ours(x, sharded(weight), None, target, reduction="none"),
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


CASES["op, exchanges three numbers a row"] = three_numbers
CASES["op, same bits on every rank"] = same_everywhere
CASES["op, second backward"] = second_backward
CASES["op, labels that do not count"] = labels
CASES["op, a part of -inf"] = part_of_minus_infinity
CASES["op, refuses what it does not know"] = refuses
