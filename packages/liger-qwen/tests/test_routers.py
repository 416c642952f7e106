"""The mixtures of experts: router and auxiliary loss stay transformers' own, and what else can run the experts."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen3_5MoeTextConfig, Qwen3MoeConfig, Qwen3NextConfig

import liger
from liger.testing import TINY
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build
from liger_qwen import qwen2_moe, qwen3_5_moe, qwen3_moe, qwen3_next

CONFIG = {
    **TINY,
    "head_dim": 32,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "router_aux_loss_coef": 0.5,
}
SHARED = {"shared_expert_intermediate_size": 40}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MODELS = {
    "qwen2_moe": (qwen2_moe, lambda **options: Qwen2MoeConfig(**CONFIG, **SHARED, **options)),
    "qwen3_moe": (qwen3_moe, lambda **options: Qwen3MoeConfig(**CONFIG, **options)),
    "qwen3_next": (qwen3_next, lambda **options: Qwen3NextConfig(**CONFIG, **SHARED, **HYBRID, **options)),
    "qwen3_5_moe": (
        qwen3_5_moe,
        lambda **options: Qwen3_5MoeTextConfig(
            **{k: v for k, v in CONFIG.items() if k != "intermediate_size"}, **SHARED, **HYBRID, **options
        ),
    ),
}
each_model = pytest.mark.parametrize(("adapter", "config"), MODELS.values(), ids=MODELS)


def pair(adapter, config, device):
    cls = getattr(adapter.module(), adapter.heads[0].model)
    return [build(cls, config, device) for _ in range(2)]


@each_model
@pytest.mark.parametrize("asked", ["never", "by the config", "by the call"])
def test_the_auxiliary_loss_is_the_stock_models(device, adapter, config, asked):
    stock, patched = pair(adapter, config(output_router_logits=asked == "by the config"), device)
    assert not liger.apply(patched).declined
    inputs = batch(CONFIG["vocab_size"], device)
    if asked == "by the call":
        inputs["output_router_logits"] = True
    theirs, ours = stock(**inputs), patched(**inputs)
    assert list(ours) == list(theirs)
    assert (ours.get("aux_loss") is None) == (asked == "never")
    if asked != "never":
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss)
        assert len(ours.router_logits) == len(theirs.router_logits) == CONFIG["num_hidden_layers"]
    assert_same_step(patched, stock, in_fp64(stock), inputs)


@each_model
def test_the_auxiliary_loss_is_not_divided_by_the_number_of_items(device, adapter, config):
    _, patched = pair(adapter, config(output_router_logits=True), device)
    liger.apply(patched)
    inputs = batch(CONFIG["vocab_size"], device)
    outputs = [patched(**inputs, num_items_in_batch=items) for items in (1, 1000)]
    (one, aux), (thousand, _) = [(o.loss, CONFIG["router_aux_loss_coef"] * o.aux_loss) for o in outputs]
    torch.testing.assert_close(thousand - aux, (one - aux) / 1000, rtol=1e-3, atol=1e-5)


@each_model
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm", "eager"])
def test_every_dispatch_of_transformers_trains_as_stock(device, adapter, config, implementation):
    stock, patched = pair(adapter, config(), device)
    for model in (stock, patched):
        model.set_experts_implementation(implementation)
    patch = liger.apply(patched)
    if implementation == "eager":
        (reason,) = {d.reason for d in patch.declined}
        assert reason.startswith("experts_implementation='eager' does not call _apply_gate")
        assert {d.kind for d in patch.declined} == {"experts"}
    else:
        assert not patch.declined
    assert_same_step(patched, stock, in_fp64(stock), batch(CONFIG["vocab_size"], device))


@each_model
def test_a_dispatch_chosen_after_apply_is_followed(device, adapter, config):
    stock, patched = pair(adapter, config(), device)
    liger.apply(patched)
    for model in (stock, patched):
        model.set_experts_implementation("eager")
    assert_same_step(patched, stock, in_fp64(stock), batch(CONFIG["vocab_size"], device))
