"""A model of one's own from `liger.nn` and `liger.ops`, that of the example, in a loop that shares it out itself."""

from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from data_parallel import ON, Step, Strategy, Wrapped, check_step, ddp, zero
from liger.ops import launch
from pair import DEVICE, RANK, WORLD, Case

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # a folder of scripts, not a package
from custom_model import HEAD, Model

CASES: dict[str, Case] = {}
CLASSES = 101


def fsdp2(own_loss: bool = False, compiled: bool = False) -> Strategy:
    """Each block a unit, as torchtitan has it; the head with the root, or the loss that owns it a unit too."""

    def wrap(model: Any) -> Wrapped:
        shard = partial(fully_shard, mesh=init_device_mesh(DEVICE, (WORLD,)))
        for block in model.blocks:
            if compiled:
                block.compile(backend="aot_eager", fullgraph=True)
            shard(block)
        if own_loss:
            shard(model.loss)
        shard(model)
        return Wrapped(model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()})

    return wrap


STRATEGIES: dict[str, tuple[Strategy, bool]] = {
    "ddp": (ddp, True),
    "fsdp2, tied head": (fsdp2(), True),
    "fsdp2, loss of its own": (fsdp2(own_loss=True), False),
    "fsdp2, compiled blocks": (fsdp2(compiled=True), True),
    "zero-3": (zero(3), True),
}
"""And whether the head is tied."""


def on_one_process(model: Any, rows: list[Tensor]) -> Step:
    losses = [model(of_rank) for of_rank in rows]
    (sum(losses) / len(losses)).backward()
    return losses[RANK].detach(), {name: p.grad for name, p in model.named_parameters()}


def train(strategy: Strategy, tied: bool) -> None:
    launch.enabled = ON.type == "cuda"
    alone = Model(CLASSES, HEAD, 2).to(ON)
    if not tied:
        alone.loss.linear.weight = nn.Parameter(alone.loss.linear.weight.detach().clone())
    wrapped = strategy(copy.deepcopy(alone))
    rows = list(torch.randint(CLASSES, (WORLD, 2, 9), device=ON))
    exact = copy.deepcopy(alone).double()
    loss = wrapped.module(rows[RANK])
    wrapped.backward(loss)
    check_step((loss.detach(), wrapped.gradients()), on_one_process(alone, rows), on_one_process(exact, rows))


for _name, _strategy in STRATEGIES.items():
    CASES[f"hand-written, {_name}"] = partial(train, *_strategy)
