"""A model with recompute on and off: one step of each, and the bytes that are kept between forward and backward."""

from __future__ import annotations

import gc

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, Phi3Config, PhiConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM

from adapted_models import LLAMA, MIXTRAL, mixtral_config
from liger.adapter import Adapter
from liger.layers import FusedGatedMLP, LayerNorm, RMSNorm
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.tiny import batch, build

PHI = Adapter(modeling="transformers.models.phi.modeling_phi", modules={"nn.LayerNorm": LayerNorm()})
PHI3 = Adapter(
    modeling="transformers.models.phi3.modeling_phi3",
    modules={"Phi3RMSNorm": RMSNorm(eps="variance_epsilon"), "Phi3MLP": FusedGatedMLP(act="hidden_act")},
)
WITHOUT_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
FAMILIES = {
    "llama": (LLAMA, LlamaForCausalLM, lambda: LlamaConfig(**TINY)),
    "mixtral": (MIXTRAL, MixtralForCausalLM, lambda: mixtral_config(experts_implementation="grouped_mm")),
    "phi": (PHI, PhiForCausalLM, lambda: PhiConfig(**WITHOUT_HEAD_DIM)),
    "phi3": (PHI3, Phi3ForCausalLM, lambda: Phi3Config(**WITHOUT_HEAD_DIM)),
}
TOKENS, H, WIDTH, LAYERS = 18, TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]


def apply(model, adapter=LLAMA, **switches):
    return apply_adapters(model, [adapter], **switches)


def pair(device, family="llama", dtype=torch.float32):
    """The same model with the option on and off."""
    adapter, cls, config = FAMILIES[family]
    models = [build(cls, config(), device, dtype) for _ in range(2)]
    for model, on in zip(models, (True, False), strict=True):
        apply(model, adapter, recompute=on)
    return models


def step(model, call=None, **more):
    """The loss and every gradient of one step."""
    model.zero_grad()
    inputs = batch(99, model.device)
    loss = call(**inputs) if call else model(**inputs, **more).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one is other is None or torch.equal(one, other)


class Allocated(TorchDispatchMode):
    """Which storages that were allocated under it are alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tensors((args, kwargs or {}))}
        for leaf in tensors(result):
            storage = leaf.untyped_storage()
            if storage._cdata not in before:
                self.storages[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage)
        return result

    def alive(self):
        return sum(size for weak, size in self.storages.values() if not weak.expired())


def tensors(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if type(leaf) in (torch.Tensor, nn.Parameter)]


def kept(model, forward=None):
    """The bytes that are alive between forward and backward, and did not exist before."""
    inputs = batch(99, model.device)
    with Allocated() as allocated:
        loss = forward(inputs) if forward else model(**inputs, use_cache=False).loss
    gc.collect()
    bytes_kept = allocated.alive()
    loss.backward()
    del loss
    model.zero_grad()
    gc.collect()
    assert allocated.alive() == 0, "something outlives backward"
    return bytes_kept
