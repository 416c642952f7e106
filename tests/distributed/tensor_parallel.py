"""Models under torch's and transformers' tensor parallelism: the loss of a head whose vocabulary lies on the ranks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

import liger
from data_parallel import ON, check_step, in_fp64, llama
from liger.lazy_logits import LazyLogits
from liger.ops import launch
from liger.sharded_head import is_vocab_parallel
from liger.testing.tiny import batch
from pair import DEVICE, WORLD, Case, skip_alone
from vocab_parallel import whole

CASES: dict[str, Case] = {}
CLASSES = 101  # in unequal parts

Place = Callable[[Any], Any]


def by_torch(style: Any) -> Place:
    def place(model: Any) -> Any:
        return parallelize_module(model, init_device_mesh(DEVICE, (WORLD,)), {"lm_head": style})

    return place


def by_transformers(model: Any) -> Any:
    """As `from_pretrained(…, tp_plan="auto")` makes it: attention, MLP and head on the ranks."""
    skip_alone()
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    model.save_pretrained(folder[0])
    dist.barrier()
    placed = AutoModelForCausalLM.from_pretrained(folder[0], tp_plan="auto", attn_implementation="eager")
    return placed.train()


def step_of(model: Any, inputs: dict[str, Tensor]) -> tuple[Any, tuple[Tensor, dict[str, Tensor]]]:
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, (outputs.loss.detach(), {name: whole(p.grad) for name, p in model.named_parameters()})


def check(
    place: Place, late: bool, *, fused: bool = True, part: bool = False, classes: int = CLASSES, **options: Any
) -> None:
    launch.enabled = ON.type == "cuda"
    stock = llama(vocab_size=classes, **options)
    exact, inputs = in_fp64(stock), batch(classes, ON)
    patched = copy.deepcopy(stock)
    if not late:
        liger.apply(patched, loss="linear")
    patched = place(patched)
    if late:
        patch = liger.apply(patched)
        assert any(s.kind == "loss" and s.runs == "linear_cross_entropy" for s in patch.swapped), patch
    outputs, ours = step_of(patched, inputs)
    assert isinstance(outputs.logits, LazyLogits) == fused
    _, own = step_of(stock, inputs)
    check_step(ours, own, step_of(exact, inputs)[1])
    if part:
        return
    expected = stock(**inputs).logits
    torch.testing.assert_close(whole(outputs.logits + 0), expected, rtol=1e-4, atol=1e-5)
    for model in (patched, stock):
        model.eval()
    with torch.no_grad():
        outputs = patched(**inputs)
        torch.testing.assert_close(outputs.loss, stock(**inputs).loss)
        torch.testing.assert_close(whole(outputs.logits + 0), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(whole(patched(inputs["input_ids"]).logits), whole(outputs.logits + 0))
    if late:
        patch.undo()
        torch.testing.assert_close(whole(patched(inputs["input_ids"]).logits), expected, rtol=1e-4, atol=1e-5)


WHOLE_OUTPUT = ColwiseParallel(output_layouts=Replicate())
STYLES = {
    "whole logits": by_torch(WHOLE_OUTPUT),
    "DTensor logits": by_torch(ColwiseParallel(use_local_output=False)),
}
for _name, _place in STYLES.items():
    CASES[f"tensor parallel, {_name}, applied before"] = partial(check, _place, False)
    CASES[f"tensor parallel, {_name}, applied after"] = partial(check, _place, True)
EQUAL_PARTS = {"num_attention_heads": 2 * WORLD, "num_key_value_heads": WORLD, "intermediate_size": 40 * WORLD}
CASES["tensor parallel, transformers"] = partial(check, by_transformers, True, classes=50 * WORLD, **EQUAL_PARTS)
CASES["tensor parallel, rowwise head returns logits"] = partial(
    check, by_torch(RowwiseParallel(input_layouts=Replicate())), True, fused=False
)


def part_of_the_logits() -> None:
    """A head that returns its rank's columns: the loss is right, where stock has none, and the logits say why not."""
    skip_alone()
    launch.enabled = ON.type == "cuda"
    stock, inputs = llama(vocab_size=CLASSES), batch(CLASSES, ON)
    patched = by_torch(ColwiseParallel())(copy.deepcopy(stock))
    liger.apply(patched)
    outputs = patched(**inputs)
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss)
    with pytest.raises(RuntimeError, match=r"output_layouts=Replicate\(\)"):
        outputs.logits + 0


def sharded_by_fsdp_is_no_tensor_parallelism() -> None:
    """FSDP's shards look the same, but hidden states differ from rank to rank: a head that FSDP does not gather."""
    launch.enabled = ON.type == "cuda"
    model = llama(vocab_size=CLASSES)
    liger.apply(model)
    fully_shard(model.lm_head, mesh=init_device_mesh(DEVICE, (WORLD,)))
    hidden = torch.randn(2, 9, model.config.hidden_size, device=ON)
    model.lm_head.reshard()
    assert type(model.lm_head.weight.placements[0]) is Shard
    assert not is_vocab_parallel(model.lm_head, hidden)


CASES["tensor parallel, a part of the logits"] = part_of_the_logits
CASES["tensor parallel, not what FSDP has sharded"] = sharded_by_fsdp_is_no_tensor_parallelism
