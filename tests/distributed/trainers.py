"""Accelerate and transformers' Trainer under FSDP2, ZeRO and DDP: a patched model trains as a stock one alone."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

import liger
from data_parallel import ON, TIED, Wrapped, in_fp64, llama, step
from liger.ops import launch
from liger.testing import TINY
from liger.testing.parity import MODEL_DEPTH, assert_each_as_exact_as
from liger.testing.tiny import batch
from pair import DEVICE, WORLD, Case

CASES: dict[str, Case] = {}
STEPS, RATE = 3, 0.05


@contextmanager
def accelerate_in_several_processes() -> Iterator[Any]:
    """Accelerate with a fresh state; on CPUs it knows neither FSDP nor DeepSpeed, unless it takes them for GPUs."""
    try:
        import accelerate
        from accelerate.state import AcceleratorState, DistributedType, PartialState
    except ImportError as error:
        raise SkipTest(f"needs accelerate: {error}") from error
    before, own = dict(os.environ), PartialState._prepare_backend
    if DEVICE == "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        as_gpus = ("gloo", DistributedType.MULTI_GPU)
        PartialState._prepare_backend = lambda self, cpu=False, *more: own(self, cpu, *more) if cpu else as_gpus
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield accelerate
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._prepare_backend = own
        os.environ.clear()
        os.environ.update(before)


def accelerated(accelerate: Any, model: Any, **options: Any) -> Wrapped:
    """By `Accelerator.prepare`: layers, embeddings, and the last norm with the head are units."""
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", **options
    )
    accelerator = accelerate.Accelerator(fsdp_plugin=plugin)
    assert accelerator.is_fsdp2
    assert accelerator.num_processes == WORLD
    module, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    return Wrapped(module, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()}, accelerator.backward)


def accelerate_fsdp2(config: dict[str, Any], late: bool, **options: Any) -> None:
    with accelerate_in_several_processes() as accelerate:
        step(partial(accelerated, accelerate, **options), config, late)


CASES["accelerate, fsdp2, applied before"] = partial(accelerate_fsdp2, {}, late=False)
CASES["accelerate, fsdp2, applied after"] = partial(accelerate_fsdp2, {}, late=True)
CASES["accelerate, fsdp2, tied head"] = partial(accelerate_fsdp2, TIED, late=False)
CASES["accelerate, fsdp2, one process loads"] = partial(
    accelerate_fsdp2, {}, late=False, cpu_ram_efficient_loading=True
)


def rows() -> list[dict[str, Tensor]]:
    """Of several batches, with unequal numbers of labels that count."""
    whole = batch(TINY["vocab_size"], torch.device("cpu"), rows=2 * WORLD * STEPS)
    whole["labels"][::3, 2:7] = -100
    return [dict(zip(whole, values, strict=True)) for values in zip(*whole.values(), strict=True)]


def in_a_loop(model: Any) -> dict[str, Tensor]:
    """The loss of each step and the weights after the last, of one process that has all the rows of a step."""
    optimizer, given, result = torch.optim.SGD(model.parameters(), lr=RATE), rows(), {}
    for i in range(STEPS):
        of_step = given[2 * WORLD * i : 2 * WORLD * (i + 1)]
        loss = model(**{name: torch.stack([row[name] for row in of_step]).to(ON) for name in of_step[0]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result[f"loss {i}"] = loss.detach()
    return result | {name: p.detach() for name, p in model.named_parameters()}


class InOrder(Trainer):
    """A Trainer that takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def by_trainer(model: Any, whole: Callable[[Any], Tensor], options: dict[str, Any]) -> dict[str, Tensor]:
    """As `in_a_loop`, by a Trainer in several processes."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=RATE, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    assert arguments.world_size == WORLD
    trainer = InOrder(model, arguments, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    weights = {name.removeprefix("module."): whole(p) for name, p in trainer.model_wrapped.named_parameters()}
    return {f"loss {i}": torch.tensor(loss, device=ON) for i, loss in enumerate(losses)} | weights


def of_zero(parameter: Any) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)


def zero(stage: int) -> dict[str, Any]:
    try:
        import deepspeed
    except ImportError as error:
        raise SkipTest(f"needs deepspeed: {error}") from error
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it builds one in C++ for 20 s; gloo will do
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    return {"deepspeed": config}


FSDP2 = {"fsdp": "full_shard", "fsdp_config": {"version": 2, "reshard_after_forward": True}}
ENGINES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[Any], Tensor]]] = {
    "ddp": (lambda: {"use_cpu": DEVICE == "cpu"}, Tensor.detach),
    "fsdp2": (lambda: copy.deepcopy(FSDP2), lambda p: p.full_tensor()),
    "zero-2": (partial(zero, 2), of_zero),
    "zero-3": (partial(zero, 3), of_zero),
}


def train(engine: str) -> None:
    launch.enabled = ON.type == "cuda"
    options, whole = ENGINES[engine]
    stock = llama(use_cache=False)
    exact, patched = in_fp64(stock), copy.deepcopy(stock)
    liger.apply(patched)
    with accelerate_in_several_processes():
        ours = by_trainer(patched, whole, options())
    own, exact = in_a_loop(stock), in_a_loop(exact)
    assert ours.keys() == own.keys()
    triples = {name: (value.detach().float(), own[name], exact[name]) for name, value in ours.items()}
    assert_each_as_exact_as(triples, depth=MODEL_DEPTH * STEPS, alone_from=None)


for _name in ENGINES:
    CASES[f"trainer, {_name}"] = partial(train, _name)
