"""A sequence in shards, one on each rank, with the labels of the next positions given: `shift_labels`."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import liger
from data_parallel import ON, check_step, in_fp64, llama
from liger.lazy_logits import LazyLogits
from liger.ops import launch
from liger.testing import TINY
from liger.testing.tiny import batch
from pair import RANK, WORLD, Case

CASES: dict[str, Case] = {}
LENGTH = 6  # of a shard


def shards(divisor: str) -> None:
    """The shards' losses weighted by their labels are the sequence's, the label across the boundary counted.

    Tokens attend to their own shard only, so that each shard's hidden states are those of the whole sequence.
    """
    launch.enabled = ON.type == "cuda"
    stock = llama()
    whole = batch(TINY["vocab_size"], ON, rows=2, length=LENGTH * WORLD)
    labels = whole["labels"]
    boundaries = slice(LENGTH, None, LENGTH)
    labels[:, boundaries] = whole["input_ids"][:, boundaries]
    labels[0, 1:4] = -100
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    mine = slice(RANK * LENGTH, (RANK + 1) * LENGTH)
    count, total = (shifted[:, mine] != -100).sum(), (shifted != -100).sum()

    patched = copy.deepcopy(stock)
    liger.apply(patched)
    options: dict[str, Any] = {"num_items_in_batch": total} if divisor == "num_items_in_batch" else {}
    outputs = patched(
        input_ids=whole["input_ids"][:, mine], labels=labels[:, mine], shift_labels=shifted[:, mine], **options
    )
    assert isinstance(outputs.logits, LazyLogits)
    loss = outputs.loss if options else outputs.loss * count / total
    loss.backward()
    sums = {name: p.grad for name, p in patched.named_parameters()}
    loss = loss.detach()
    for value in (loss, *sums.values()):
        dist.all_reduce(value)

    block = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=ON).tril()
    own_shard = torch.block_diag(*[block] * WORLD).bool()[None, None].expand(2, 1, -1, -1)
    positions = torch.arange(LENGTH, device=ON).repeat(WORLD)[None]
    given = {**whole, "labels": labels, "position_ids": positions}

    def on_whole(model: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        mask = torch.zeros(own_shard.shape, dtype=dtype, device=ON).masked_fill(~own_shard, torch.finfo(dtype).min)
        result = model(**given, attention_mask=mask).loss
        result.backward()
        return result.detach(), {name: p.grad for name, p in model.named_parameters()}

    check_step((loss, sums), on_whole(stock, torch.float32), on_whole(in_fp64(stock), torch.float64))


CASES["shift_labels of two shards, mean"] = lambda: shards("mean")
CASES["shift_labels of two shards, num_items_in_batch"] = lambda: shards("num_items_in_batch")
