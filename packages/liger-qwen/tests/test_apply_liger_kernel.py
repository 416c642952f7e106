"""`apply_liger_kernel_to_<model>` for every model, and the classifiers that no contract builds."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextForSequenceClassification

import liger
import liger_qwen
from liger.testing import TINY
from liger.testing.tiny import batch, build

EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 32,
}
OPTIONS = {
    "qwen2": {},
    "qwen2_moe": SHARED,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**SHARED, **LINEAR},
    "qwen3_5": LINEAR,
    "qwen3_5_moe": {**SHARED, **LINEAR},
}
each_model = pytest.mark.parametrize("name", OPTIONS)


def make(name, device):
    adapter = getattr(liger_qwen, name)
    cls = getattr(adapter.module(), adapter.heads[0].model)
    options = {**TINY, **OPTIONS[name]}
    if name == "qwen3_5_moe":
        del options["intermediate_size"]
    return build(cls, cls.config_class(**options), device)


@each_model
def test_on_a_model(name, device):
    apply = getattr(liger_qwen, f"apply_liger_kernel_to_{name}")
    model = make(name, device)
    kinds = (
        {"norm", "mlp", "experts", "rope", "loss"}
        if "num_experts" in OPTIONS[name]
        else {"norm", "mlp", "rope", "loss"}
    )
    if name == "qwen3_moe":  # all its layers are routed, and it has no shared expert
        kinds.remove("mlp")
    with apply(model) as patch:
        assert {s.kind for s in patch.swapped} == kinds
        assert not patch.declined
    with apply(model, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True) as patch:
        assert {s.kind for s in patch.swapped} == kinds
    with apply(model, rope=False, rms_norm=False, swiglu=False) as patch:
        assert {s.kind for s in patch.swapped} == {"loss"}


@each_model
def test_on_models_to_be_built(name, device):
    patch = getattr(liger_qwen, f"apply_liger_kernel_to_{name}")()
    try:
        model = make(name, device)
    finally:
        patch.undo()
    stock = make(name, device)
    assert not liger.apply(model).swapped
    assert liger.apply(stock).swapped
    inputs = batch(TINY["vocab_size"], device)
    torch.testing.assert_close(model(**inputs).loss, stock(**inputs).loss)


def test_qwen3_5s_classifier_of_text(device, path):
    config = Qwen3_5TextConfig(**TINY, **{k: v for k, v in LINEAR.items() if k != "head_dim"})
    stock, patched = (build(Qwen3_5TextForSequenceClassification, config, device) for _ in range(2))
    patch = liger.apply(patched)
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "rope"}
    assert not patch.declined
    inputs = {**batch(TINY["vocab_size"], device), "labels": torch.tensor([0, 1], device=device)}
    ours, theirs = patched(**inputs), stock(**inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)
