"""Data parallel training of a patched model: every rank has its own batch, and the gradients of all of them."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest import SkipTest

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM

import liger
from liger.lazy_logits import LazyLogits
from liger.ops import launch
from liger.testing import TINY
from liger.testing.parity import MODEL_DEPTH, assert_each_as_exact_as, in_fp64
from liger.testing.tiny import batch, build
from pair import DEVICE, RANK, WORLD, Case

CASES: dict[str, Case] = {}
ON = torch.device(DEVICE)

Inputs = dict[str, Tensor]
Step = tuple[Tensor, dict[str, Tensor]]


class Wrapped(NamedTuple):
    """A model under a strategy: what is called, its whole gradients by parameter, and how backward is run."""

    module: Any
    gradients: Callable[[], dict[str, Tensor]]
    backward: Callable[[Tensor], None] = Tensor.backward


Strategy = Callable[[Any], Wrapped]


def llama(**options: Any) -> Any:
    return build(LlamaForCausalLM, LlamaConfig(**{**TINY, **options}), ON)


def batches() -> list[Inputs]:
    """One for each rank, with other tokens and another number of labels that count."""
    whole = batch(TINY["vocab_size"], ON, rows=2 * WORLD)
    whole["labels"][0, 2:7] = -100
    return [{name: value[2 * rank : 2 * rank + 2] for name, value in whole.items()} for rank in range(WORLD)]


def on_one_process(model: Any, inputs: list[Inputs]) -> Step:
    """This rank's loss, and the gradients of the mean over the ranks, which is what the strategies reduce to."""
    losses = [model(**of_rank).loss for of_rank in inputs]
    (sum(losses) / len(losses)).backward()
    return losses[RANK].detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_step(ours: Step, own: Step, exact: Step) -> None:
    assert ours[1].keys() == own[1].keys()
    # offloaded gradients lie on the CPU
    triples = {name: (gradient.to(ON), own[1][name], exact[1][name]) for name, gradient in ours[1].items()}
    assert_each_as_exact_as({"loss": (ours[0], own[0], exact[0]), **triples}, depth=MODEL_DEPTH, alone_from=None)


def wrapped_llama(strategy: Strategy, late: bool, **options: Any) -> tuple[Any, Wrapped]:
    """(stock, patched and wrapped) of the same weights; `late`: patched when it is wrapped already."""
    launch.enabled = ON.type == "cuda"  # interpreted kernels would take minutes
    stock = llama(**options)
    patched = copy.deepcopy(stock)
    if not late:
        liger.apply(patched)
    wrapped = strategy(patched)
    if late:
        liger.apply(wrapped.module)
    return stock, wrapped


def ddp(model: Any) -> Wrapped:
    return Wrapped(DistributedDataParallel(model), lambda: {n: p.grad for n, p in model.named_parameters()})


def fsdp2(*units: str, **options: Any) -> Strategy:
    def wrap(model: Any) -> Wrapped:
        shard = partial(fully_shard, mesh=init_device_mesh(DEVICE, (WORLD,)), **options)
        for unit in units:
            for module in model.model.layers if unit == "layers" else [model.get_submodule(unit)]:
                shard(module)
        shard(model)
        return Wrapped(model, lambda: {n: p.grad.full_tensor() for n, p in model.named_parameters()})

    return wrap


def fsdp1(*units: type[nn.Module]) -> Strategy:
    def wrap(model: Any) -> Wrapped:
        policy = ModuleWrapPolicy(set(units)) if units else None
        wrapped = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=ON)

        def gradients() -> dict[str, Tensor]:
            with FullyShardedDataParallel.summon_full_params(wrapped, with_grads=True):
                named = wrapped.named_parameters()
                return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in named}

        return Wrapped(wrapped, gradients)

    return wrap


def zero(stage: int) -> Strategy:
    def wrap(model: Any) -> Wrapped:
        try:
            import deepspeed
        except ImportError as error:
            raise SkipTest(f"needs deepspeed: {error}") from error
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it builds one in C++ for 20 s; gloo will do
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        }
        named = list(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        return Wrapped(engine, lambda: {n: deepspeed.utils.safe_get_full_grad(p) for n, p in named}, engine.backward)

    return wrap


TIED = {"tie_word_embeddings": True}
LAYERS = fsdp2("layers")
OWN_HEAD = fsdp2("layers", "lm_head")
STRATEGIES: dict[str, tuple[Strategy, dict[str, Any]]] = {
    "ddp": (ddp, {}),
    "ddp, tied head": (ddp, TIED),
    "fsdp2, root only": (fsdp2(), {}),
    "fsdp2, layers": (LAYERS, {}),
    "fsdp2, layers and root resharded": (fsdp2("layers", reshard_after_forward=True), {}),
    "fsdp2, head of its own": (OWN_HEAD, {}),
    "fsdp2, tied head": (LAYERS, TIED),
    "fsdp2, cpu offload": (fsdp2("layers", "lm_head", offload_policy=CPUOffloadPolicy(pin_memory=False)), {}),
    "fsdp1, root only": (fsdp1(), {}),
    "fsdp1, layers": (fsdp1(LlamaDecoderLayer), {}),
    "zero-2": (zero(2), {}),
    "zero-3": (zero(3), {}),
    "zero-3, tied head": (zero(3), TIED),
}


def step(strategy: Strategy, options: dict[str, Any], late: bool, fused: bool = True, **more: Any) -> None:
    stock, wrapped = wrapped_llama(strategy, late, **options)
    inputs = [{**of_rank, **more} for of_rank in batches()]
    outputs = wrapped.module(**inputs[RANK])
    assert isinstance(outputs.logits, LazyLogits) == fused
    wrapped.backward(outputs.loss)
    exact = in_fp64(stock)
    check_step((outputs.loss, wrapped.gradients()), on_one_process(stock, inputs), on_one_process(exact, inputs))


for _name, _strategy in STRATEGIES.items():
    CASES[f"{_name}, applied before"] = partial(step, *_strategy, late=False)
    CASES[f"{_name}, applied after"] = partial(step, *_strategy, late=True)
for _late in (False, True):
    _strategy, _when = fsdp1(LlamaDecoderLayer, nn.Linear), "after" if _late else "before"
    CASES[f"fsdp1, head in a wrapper returns logits, applied {_when}"] = partial(
        step, _strategy, {}, _late, fused=False
    )
for _name, _strategy in (("ddp", ddp), ("fsdp2", OWN_HEAD)):
    CASES[f"{_name}, num_items_in_batch"] = partial(step, _strategy, {}, False, num_items_in_batch=torch.tensor(13.0))


def mixed_precision(*units: str) -> None:
    """In bf16 the yardstick is the stock model under the same strategy."""
    strategy = fsdp2(*units, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    stock, ours = wrapped_llama(strategy, late=False)
    exact, own, inputs = in_fp64(stock), strategy(copy.deepcopy(stock)), batches()
    steps = []
    for wrapped in (ours, own):
        loss = wrapped.module(**inputs[RANK]).loss
        loss.backward()
        steps.append((loss.detach(), wrapped.gradients()))
    (loss, gradients), (own_loss, own_gradients) = steps
    exact_loss, exact_gradients = on_one_process(exact, inputs)
    triples = {name: (gradient, own_gradients[name], exact_gradients[name]) for name, gradient in gradients.items()}
    assert_each_as_exact_as({"loss": (loss.bfloat16(), own_loss.bfloat16(), exact_loss)}, depth=MODEL_DEPTH)
    assert_each_as_exact_as(triples, depth=MODEL_DEPTH, alone_from=None)


CASES["fsdp2, bf16, root holds the head"] = partial(mixed_precision, "layers")
CASES["fsdp2, bf16, head of its own"] = partial(mixed_precision, "layers", "lm_head")

FAMILIES = {
    "gemma2": ("Gemma2", ddp, {"final_logit_softcapping": 5.0}),
    "mistral": ("Mistral", OWN_HEAD, {}),
    "qwen3_moe": ("Qwen3Moe", ddp, {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
                                    "output_router_logits": True, "router_aux_loss_coef": 0.1}),
    "phi": ("Phi", OWN_HEAD, {}),
}  # fmt: skip


def family(package: str) -> None:
    launch.enabled = ON.type == "cuda"
    prefix, strategy, options = FAMILIES[package]
    modeling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    stock = build(
        getattr(modeling, f"{prefix}ForCausalLM"), getattr(modeling, f"{prefix}Config")(**{**TINY, **options}), ON
    )
    patched = copy.deepcopy(stock)
    liger.apply(patched, loss="linear")
    wrapped, inputs = strategy(patched), batches()
    outputs = wrapped.module(**inputs[RANK])
    assert isinstance(outputs.logits, LazyLogits)
    outputs.loss.backward()
    exact = in_fp64(stock)
    check_step((outputs.loss, wrapped.gradients()), on_one_process(stock, inputs), on_one_process(exact, inputs))


for _name in FAMILIES:
    CASES[f"family {_name}"] = partial(family, _name)
