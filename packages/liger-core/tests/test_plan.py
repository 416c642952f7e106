"""plan: what `apply` would do, found out without doing it, with or without weights; and which modules it skips."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from adapted_models import LLAMA, llama
from liger.patch import apply_adapters
from liger.plan import plan
from liger.switches import Switches
from liger.testing import TINY
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch


@pytest.fixture
def model(device):
    return llama(device)


def apply(model, **switches):
    return apply_adapters(model, [LLAMA], **switches)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def skipped(patch):
    return {d.name for d in patch.declined if d.reason.startswith("skipped")}


@pytest.mark.parametrize(
    "switches", [{}, {"recompute": True, "norm": False}, {"loss": "full", "skip": ["layers.1.*"]}], ids=str
)
def test_a_model_without_weights_has_the_plan_of_the_same_model_with_them(model, switches):
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config)
    without, having = (plan(m, [LLAMA], Switches(**switches)) for m in (empty, model))
    assert without.swapped
    assert (without.swapped, without.declined) == (having.swapped, having.declined)
    assert str(without).startswith("liger.Plan\n")


def test_planning_changes_nothing_and_applying_does_what_was_planned(model):
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    planned = plan(model, [LLAMA])
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    patch = apply(model)
    assert (patch.swapped, patch.declined) == (planned.swapped, planned.declined)


def test_what_is_asked_for_and_cannot_be_had_is_declined_in_a_plan(device):
    model = llama(device, hidden_act="relu")
    assert {d.kind for d in plan(model, [LLAMA], Switches(mlp=True)).declined} == {"mlp"}


def test_skipped_modules_keep_their_class_and_are_reported(model):
    everything, before = {s.name for s in plan(model, [LLAMA]).swapped}, classes(model)
    patch = apply(model, skip=["model.layers.0.*", "norm"])
    left = {name for name in everything if name.startswith("model.layers.0.")} | {"model.norm"}
    assert len(left) == 5
    assert skipped(patch) == left
    assert {s.name for s in patch.swapped} == everything - left
    assert {name for name in everything if classes(model)[name] is before[name]} == left
    assert "  mlp   1 × LlamaMLP declined: skipped by 'model.layers.0.*'" in str(patch).splitlines()
    assert "  norm  1 × LlamaRMSNorm declined: skipped by 'norm'" in str(patch).splitlines()


def test_a_skipped_head_leaves_the_logits_whole(model):
    stock = copy.deepcopy(model)
    patch = apply(model, skip=["lm_head"])
    assert type(model.lm_head) is nn.Linear
    assert [s.runs for s in patch.swapped if s.kind == "loss"] == ["cross_entropy of the logits"]
    assert_same_step(model, stock, in_fp64(stock), batch(TINY["vocab_size"], model.device))


def test_everything_can_be_skipped(model):
    before = classes(model)
    assert not apply(model, skip=["*"]).swapped
    assert classes(model) == before


def test_a_model_that_asks_a_language_model_for_its_logits_has_a_loss_of_its_own(caplog):
    vision = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    qformer = {name: vision[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
    config = InstructBlipConfig(
        vision_config=vision,
        qformer_config={**qformer, "num_attention_heads": 2, "encoder_hidden_size": 32, "vocab_size": 50},
        text_config={**TINY, "model_type": "llama"},
        num_query_tokens=4,
        image_token_index=95,
    )
    patch = apply(InstructBlipForConditionalGeneration(config))
    (declined,) = (declined for declined in patch.declined if declined.kind == "loss")
    assert declined.cls == "InstructBlipForConditionalGeneration"
    assert declined.reason == "no adapter names this class, so that its loss takes the whole logits"
    assert "the head and its loss are not fused" in caplog.text
    with pytest.raises(ValueError, match="loss='linear' was asked for and can be applied nowhere: InstructBlipFor"):
        apply(InstructBlipForConditionalGeneration(config), loss="linear")


def test_a_pattern_finds_the_modules_inside_a_wrapper(model):
    wrapper = nn.ModuleDict({"module": nn.ModuleDict({"base_model": model})})
    full = "module.base_model.model.layers.1.mlp"
    for pattern in (full, "model.layers.1.mlp", "1.mlp"):
        with apply(wrapper, skip=[pattern]) as patch:
            assert skipped(patch) == {full}


@pytest.mark.parametrize("pattern", ["model.layers.7.*", "lm_heads", "model.layers.0", "model.layers.0.mlp.act_fn"])
def test_a_pattern_that_means_nothing_is_refused_before_anything_changes(model, pattern):
    before = classes(model)
    with pytest.raises(ValueError, match=re.escape(f"skip={pattern!r} matches no module that a kernel is meant for")):
        apply(model, skip=["mlp", pattern])
    assert classes(model) == before


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"norm": True, "skip": ["*norm"]}, "norm=True was asked for .* LlamaRMSNorm: skipped by '*norm'"),
        ({"loss": "linear", "skip": ["lm_head"]}, "loss='linear' was asked for .* Linear: skipped by 'lm_head'"),
        ({"recompute": True, "skip": ["model"]}, "recompute=True was asked for .* LlamaModel: skipped by 'model'"),
    ],
    ids=str,
)
def test_what_is_asked_for_by_name_and_skipped_everywhere_is_an_error(model, switches, said):
    before = classes(model)
    with pytest.raises(ValueError, match=said.replace("*norm", r"\*norm")):
        apply(model, **switches)
    assert classes(model) == before


@pytest.mark.parametrize("name", ["base_layer", "original_module", "modules_to_save"])
def test_a_name_of_pefts_where_there_is_no_peft(device, name):
    model = nn.Module()
    model.inner = nn.Module()
    setattr(model.inner, name, nn.ModuleDict({"default": llama(device)}))
    assert {s.kind for s in apply_adapters(model, [LLAMA]).swapped} == {"norm", "mlp", "rope", "loss"}
