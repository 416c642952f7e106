"""verify: a sound patch passes, one broken in any part is found and named, and the model is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

import adapted_models
import liger
from adapted_models import LLAMA, MIXTRAL
from liger import layers, ops
from liger.causal_lm import CausalLM
from liger.layers import RMSNorm
from liger.ops import rotary
from liger.patch import apply_adapters
from liger.subclass import Swappable
from liger.testing import TINY
from liger.testing.tiny import batch, build

pytestmark = pytest.mark.usefixtures("no_interpreter")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def llama(device, dtype=torch.float32, adapter=LLAMA, **options):
    model = adapted_models.llama(device, dtype, **options)
    if adapter is not None:
        apply_adapters(model, [adapter])
    return model


def mixtral(device, dtype=torch.float32):
    model = adapted_models.mixtral(device, dtype)
    apply_adapters(model, [MIXTRAL])
    return model


class _Skewed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def skewed(x, factor=1.02):
    """`x`, whose gradient alone is wrong."""
    return _Skewed.apply(x, factor)


def differing(report):
    return {c.name.removeprefix("the gradient of ") for c in report.differing}


@DTYPES
@pytest.mark.parametrize("make", [llama, mixtral])
def test_a_sound_patch_passes(device, path, make, dtype):
    report = liger.verify(make(device, dtype))
    assert report.ok
    assert not report.unreached
    assert not report.suspects
    assert "stock's, but for rounding" in str(report)


def test_a_model_that_is_not_patched_is_for_the_time_of_it(device, monkeypatch):
    seen = []

    def apply(model):
        seen.append(apply_adapters(model, [LLAMA]))
        return seen[0]

    monkeypatch.setattr(importlib.import_module("liger.verify"), "apply", apply)
    model = llama(device, adapter=None)
    report = liger.verify(model)
    assert report.ok
    assert len(report.compared) == 1 + len(list(model.parameters()))
    assert len(seen) == 1
    assert not any(isinstance(module, Swappable) for module in model.modules())


def break_norm(monkeypatch):
    monkeypatch.setattr(layers, "rms_norm", lambda x, w, *args, **kw: ops.rms_norm(x, skewed(w), *args, **kw))


def break_mlp(monkeypatch):
    sound = layers._SWIGLU
    gate = dataclasses.replace(
        sound, op=lambda gate, up: sound.op(gate, skewed(up)), joined=lambda gate_up: sound.joined(skewed(gate_up))
    )
    monkeypatch.setitem(layers._GATES, "silu", gate)


def break_loss(monkeypatch):
    module = importlib.import_module("liger.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "scaled", lambda *args: 1.02 * sound(*args))
    sound = importlib.import_module("liger.ops.upstream_scale").scaled


def skewed_rotary(q, k, cos, sin, unsqueeze_dim=1):
    return rotary(q, skewed(k), cos, sin, unsqueeze_dim)


@pytest.mark.parametrize(
    ("broken", "suspect", "example"),
    [
        (break_norm, "norm, LlamaRMSNorm", "model.norm.weight"),
        (break_mlp, "mlp, LlamaMLP", "model.layers.0.mlp.up_proj.weight"),
        (break_loss, "the loss", "lm_head.weight"),
        (None, "rope, LlamaAttention", "model.layers.0.self_attn.k_proj.weight"),
    ],
    ids=["norm", "mlp", "loss", "rope"],
)
def test_a_gradient_off_by_two_percent_is_found_and_its_part_named(device, monkeypatch, broken, suspect, example):
    adapter = LLAMA
    if broken is None:
        adapter = dataclasses.replace(LLAMA, functions={"apply_rotary_pos_emb": skewed_rotary})
    else:
        broken(monkeypatch)
    report = liger.verify(llama(device, adapter=adapter))
    assert not report.ok
    assert example in differing(report)
    assert "the loss" not in differing(report), "the losses are equal"
    assert [s.partition(" →")[0] for s in report.suspects] == [suspect]
    assert f"because of {suspect}" in str(report)


def test_of_a_weight_the_gradient_alone(device, monkeypatch):
    """What is named is what is wrong, and nothing else."""
    break_norm(monkeypatch)
    report = liger.verify(model := llama(device))
    assert differing(report) == {name for name, _ in model.named_parameters() if "norm" in name}
    wrong = report.differing[0]
    assert 0.019 < wrong.error < 0.021
    assert wrong.rounding < 1e-4
    assert str(wrong) in str(report)


def test_experts_are_told_from_the_rest(device, monkeypatch):
    break_mlp(monkeypatch)
    report = liger.verify(mixtral(device))
    assert [s.partition(" →")[0] for s in report.suspects] == ["experts, MixtralExperts"]


@pytest.mark.parametrize(
    ("suspect", "changed"),
    [
        ("norm", {"modules": {**LLAMA.modules, "LlamaRMSNorm": RMSNorm(eps="variance_epsilon", offset=0.2)}}),
        ("rope", {"functions": {"apply_rotary_pos_emb": lambda q, k, cos, sin, unsqueeze_dim=1: (q, k)}}),
        ("the loss", {"head": CausalLM("LlamaForCausalLM", softcap="rms_norm_eps")}),
    ],
)
def test_a_wrong_adapter_is_found_in_bf16_too(device, suspect, changed):
    model = llama(device, torch.bfloat16, dataclasses.replace(LLAMA, **changed), rms_norm_eps=1.0)
    report = liger.verify(model)
    assert not report.ok
    assert [s.partition(",")[0] for s in report.suspects] == [suspect]


def test_several_broken_parts_are_all_named(device, monkeypatch):
    break_norm(monkeypatch)
    break_mlp(monkeypatch)
    report = liger.verify(llama(device))
    assert {s.partition(",")[0] for s in report.suspects} == {"norm", "mlp"}


def test_a_difference_that_a_second_batch_does_not_show_is_said(device, monkeypatch):
    calls = []

    def op(gate, up):
        calls.append(up)
        return ops.swiglu(gate, skewed(up) if len(calls) == 1 else up)

    monkeypatch.setitem(layers._GATES, "silu", dataclasses.replace(layers._SWIGLU, op=op))
    report = liger.verify(llama(device))
    assert report.ok
    assert report.repeated
    assert "a second did not" in str(report)


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


def test_dropout_draws_the_same_numbers_in_both(device):
    report = liger.verify(llama(device, attention_dropout=0.5))
    assert report.ok
    assert max(c.rounding for c in report.compared) < 1e-3, "another mask counts as rounding"


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


def test_autocast(device):
    with torch.autocast(device.type, torch.bfloat16):
        report = liger.verify(llama(device))
    assert report.ok
    assert max(c.rounding for c in report.compared) > 1e-3, "ran in fp32"


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


def test_modules_that_the_tokens_never_reach_are_named(device):
    model = llama(device, adapter=None)
    model.spare = LlamaRMSNorm(8)
    apply_adapters(model, [LLAMA])
    report = liger.verify(model)
    assert report.ok
    assert report.unreached == ("spare",)
    assert "1 swapped modules were not reached: spare" in str(report)


def test_given_inputs_are_what_runs(device):
    model, seen = llama(device), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    inputs = batch(TINY["vocab_size"], device)
    assert liger.verify(model, inputs=inputs).ok
    assert all(ids is inputs["input_ids"] for ids in seen)


def test_random_tokens_mean_nothing_special(device):
    model, seen = llama(device, image_token_id=50), []
    model.config.eos_token_id = [2, 7]
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    liger.verify(model)
    ids, labels = seen[0]["input_ids"], seen[0]["labels"]
    assert not torch.isin(ids, torch.tensor([0, 1, 2, 7, 50], device=device)).any()
    assert 0 < (labels == -100).sum() < labels.numel() / 2


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


def test_a_forward_that_classes_do_not_switch_is_refused(device):
    """accelerate's hooks keep the forward that they found: stock would be compared with itself."""
    model = llama(device)
    model.model.norm.forward = functools.partial(type(model.model.norm).forward, model.model.norm)
    with pytest.raises(ValueError, match=r"the forward of model\.norm was replaced on the instance"):
        liger.verify(model)


def test_a_class_that_was_derived_from_since_is_refused(device):
    model = llama(device)
    model.model.norm.__class__ = type("Derived", (type(model.model.norm),), {})
    with pytest.raises(ValueError, match=r"model\.norm was swapped by liger\.apply and has become a Derived"):
        liger.verify(model)


def test_what_cannot_be_compared_is_said(device):
    model = llama(device)
    with pytest.raises(TypeError, match="must be a torch.nn.Module, not str"):
        liger.verify("llama")
    with pytest.raises(ValueError, match="LlamaForCausalLM returned no loss for input_ids"):
        liger.verify(model, inputs={"input_ids": torch.ones(1, 4, dtype=torch.int64, device=device)})
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is not finite without any kernel"):
        liger.verify(broken)


@pytest.mark.gpu
def test_takes_the_devices_memory_of_one_step(device):
    config = LlamaConfig(**{**TINY, "hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 32000})
    model = build(LlamaForCausalLM, config, device, torch.bfloat16)
    apply_adapters(model, [LLAMA])
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assert liger.verify(model).ok
    assert torch.cuda.memory_allocated() - before < 2**24
    assert torch.cuda.max_memory_allocated() - before < size + 3 * largest
