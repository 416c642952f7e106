"""verify: a sound patch passes, and one broken in any part is found and named."""

from __future__ import annotations

import copy
import dataclasses
import importlib

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRMSNorm

import liger
from adapted_models import LLAMA
from liger import layers, ops
from liger.causal_lm import CausalLM
from liger.layers import RMSNorm
from liger.ops import rotary
from liger.patch import apply_adapters
from liger.subclass import Swappable
from liger.testing import TINY
from liger.testing.tiny import batch, build
from verifying import break_loss, break_mlp, break_norm, llama, mixtral, put_gate, skewed

pytestmark = pytest.mark.usefixtures("no_interpreter")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


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
        ("the loss", {"head": CausalLM("LlamaForCausalLM", logit_scale="config.initializer_range")}),
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

    put_gate(monkeypatch, dataclasses.replace(layers._SWIGLU, op=op))
    report = liger.verify(llama(device))
    assert report.ok
    assert report.repeated
    assert "a second did not" in str(report)


def test_dropout_draws_the_same_numbers_in_both(device):
    report = liger.verify(llama(device, attention_dropout=0.5))
    assert report.ok
    assert max(c.rounding for c in report.compared) < 1e-3, "another mask counts as rounding"


def test_autocast(device):
    with torch.autocast(device.type, torch.bfloat16):
        report = liger.verify(llama(device))
    assert report.ok
    assert max(c.rounding for c in report.compared) > 1e-3, "ran in fp32"


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
