"""verify on models of every make: what it leaves as it was, what it compares, and what it refuses by name."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import adapted_models
import liger
from adapted_models import LLAMA
from liger import layers
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.tiny import batch
from verifying import break_mlp, break_norm, llama

pytestmark = pytest.mark.usefixtures("no_interpreter")


def state(model):
    return [
        (type(m), m.training, sorted(vars(m)), list(m._forward_hooks), list(m._forward_pre_hooks), m._backward_hooks)
        for m in model.modules()
    ]


@pytest.mark.parametrize("outcome", ["the same", "different", "an error in stock", "an error in a kernel"])
def test_everything_is_left_as_it_was(device, outcome, monkeypatch):
    model = llama(device, attention_dropout=0.3)
    model(**batch(TINY["vocab_size"], device)).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.eval()
    model.model.layers[0].train()
    model.register_buffer("statistics", torch.zeros(3, device=device))
    model.register_forward_pre_hook(lambda module, _: setattr(module.statistics, "data", module.statistics + 1))
    gradients = {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters()}
    weights = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    checkpoint = model.model.layers[1]._gradient_checkpointing_func
    before, numbers = state(model), torch.get_rng_state()
    if outcome == "an error in a kernel":
        monkeypatch.setattr(layers, "rms_norm", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            liger.verify(model)
    elif outcome == "an error in stock":
        with pytest.raises(ValueError, match="returned no loss"):
            liger.verify(model, inputs={"input_ids": torch.ones(1, 4, dtype=torch.int64, device=device)})
    else:
        if outcome == "different":
            break_norm(monkeypatch)
        assert liger.verify(model).ok == (outcome == "the same")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)
    assert model.model.layers[1]._gradient_checkpointing_func is checkpoint
    assert torch.equal(model.statistics, torch.zeros(3, device=device))
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert torch.equal(parameter.grad, gradients[name][1])
        assert parameter is weights[name][0]
        assert torch.equal(parameter, weights[name][1])


def test_hooks_on_gradients_do_not_fire(device):
    """An optimizer that steps in backward, or DDP's reducer, must hear nothing of it."""
    model, fired = llama(device), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    assert liger.verify(model).ok
    assert not fired
    model(**batch(TINY["vocab_size"], device)).loss.backward()
    assert fired


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(device, reentrant, monkeypatch):
    model = llama(device)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert liger.verify(model).ok
    break_norm(monkeypatch)
    assert not liger.verify(model).ok


def test_recompute(device):
    model = adapted_models.llama(device)
    apply_adapters(model, [LLAMA], recompute=True)
    assert liger.verify(model).ok


def test_a_compiled_model_is_verified_eagerly(device):
    model = torch.compile(llama(device), backend=lambda *_: 1 / 0)
    assert liger.verify(model).ok


def test_only_what_trains_is_compared(device):
    model = llama(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    assert [c.name for c in sorted(liger.verify(model).compared)] == [
        *(f"the gradient of model.layers.{i}.self_attn.q_proj.weight" for i in range(2)),
        "the loss",
    ]
    model.requires_grad_(False)
    assert [c.name for c in liger.verify(model).compared] == ["the loss"]


@pytest.mark.parametrize("order", ["peft, then patched", "patched, then peft"])
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["lm_head"]], ids=["layers", "head"])
def test_lora(device, order, targets, monkeypatch):
    peft = pytest.importorskip("peft")
    model = llama(device, adapter=LLAMA if order.startswith("patched") else None)
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    if order.startswith("peft"):
        apply_adapters(model, [LLAMA])
    report = liger.verify(model)
    assert report.ok, str(report)
    assert len(report.compared) == 1 + sum("lora" in name for name, _ in model.named_parameters())
    break_mlp(monkeypatch)
    assert liger.verify(model).ok == (targets == ["lm_head"]), "nothing trains below a head's adapter"


def test_inside_a_wrapper(device):
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.config = model.config

        def forward(self, **inputs):
            return self.model(**inputs)

    assert liger.verify(Wrapper(llama(device))).ok


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_module_inside_ddp(device, one_process):
    model = nn.parallel.DistributedDataParallel(llama(device))
    assert liger.verify(model).ok
    model(**batch(TINY["vocab_size"], device)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_sharded_model_is_refused_by_name(device, one_process):
    mesh = dist.device_mesh.init_device_mesh(device.type, (1,))
    model = llama(device)
    fully_shard(model.model.layers[1], mesh=mesh)
    with pytest.raises(ValueError, match=r"model\.layers\.1 is sharded by FSDP"):
        liger.verify(model)


class DTensorLike(nn.Parameter):
    device_mesh = None


@pytest.mark.parametrize(
    ("weight", "how"),
    [
        (lambda w: DTensorLike(w.detach()), "a DTensor"),
        (lambda w: nn.Parameter(w.detach().to("meta")), "on the meta device"),
    ],
)
def test_a_weight_that_is_not_whole_is_refused_by_name(device, weight, how):
    model = llama(device)
    model.lm_head.weight = weight(model.lm_head.weight)
    with pytest.raises(ValueError, match=f"lm_head.weight is {how}"):
        liger.verify(model)


def test_a_weight_that_zero_has_partitioned_is_refused_by_name(device):
    model = llama(device)
    model.model.norm.weight.ds_id = 3
    with pytest.raises(ValueError, match=r"model\.norm\.weight is partitioned by ZeRO-3"):
        liger.verify(model)


@pytest.mark.parametrize(("path", "name"), [("model.norm", r"model\.norm"), ("", "the model itself")])
def test_a_forward_that_classes_do_not_switch_is_refused(device, path, name):
    """accelerate's hooks keep the forward that they found: stock would be compared with itself."""
    model = llama(device)
    module = model.get_submodule(path)
    module.forward = functools.partial(type(module).forward, module)
    with pytest.raises(ValueError, match=rf"the forward of {name} was replaced on the instance by .*\.forward"):
        liger.verify(model)


def test_a_class_that_was_derived_from_since_is_refused(device):
    model = llama(device)
    model.model.norm.__class__ = type("Derived", (type(model.model.norm),), {})
    with pytest.raises(ValueError, match=r"model\.norm was swapped by liger\.apply and has become a Derived"):
        liger.verify(model)
