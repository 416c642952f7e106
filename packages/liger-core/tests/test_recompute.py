"""recompute: the same loss and gradients from fewer kept bytes, and nothing where it cannot be had safely."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaModel

from adapted_models import llama
from liger import recompute
from liger.ops import launch
from liger.testing.tiny import batch
from recomputing import FAMILIES, LAYERS, TOKENS, WIDTH, H, apply, assert_equal, kept, pair, step

pytestmark = pytest.mark.usefixtures("no_interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_bit_for_bit(device, path, family, dtype):
    on, off = pair(device, family, dtype)
    assert_equal(step(on), step(off))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_outputs_and_products_are_not_kept(device, path, dtype):
    """To the byte: two norm outputs and one product a layer, less the copies of two weights."""
    on, off = pair(device, dtype=dtype)
    saved = LAYERS * (TOKENS * (2 * H + WIDTH) - 2 * H) * dtype.itemsize
    # The references keep fp32 copies of bf16 inputs: those inputs are not kept, so nothing can be rebuilt from them.
    assert kept(off) - kept(on) == (saved if path == "kernel" or dtype == torch.float32 else 0)


@pytest.mark.parametrize(("family", "width"), [("phi3", 2 * H + WIDTH), ("phi", H), ("mixtral", 2 * H + 2 * WIDTH)])
def test_other_layers(device, path, family, width):
    """A fused gate and up; LayerNorm; experts, each token's product twice, and a norm whose output is a view's base."""
    on, off = pair(device, family)
    saved = kept(off) - kept(on)
    weights = {"phi3": 2 * H, "phi": 2 * H, "mixtral": 2 * H}[family]
    assert saved == LAYERS * (TOKENS * width - weights) * 4


def test_each_output_is_rebuilt_once_a_backward(device, monkeypatch):
    on, off = pair(device)
    calls = []
    compute = recompute._Recipe._compute
    monkeypatch.setattr(recompute._Recipe, "_compute", lambda self: (calls.append(self), compute(self))[1])
    loss = on(**batch(99, on.device)).loss
    loss.backward(retain_graph=True)
    assert len(calls) == len(set(calls)) == 3 * LAYERS
    assert all(recipe.rebuilt is None for recipe in calls), "a rebuilt tensor outlives its consumers"
    loss.backward()
    assert len(calls) == 2 * len(set(calls)) == 6 * LAYERS
    theirs = step(off)
    assert_equal([p.grad / 2 for p in on.parameters()], theirs[1:])


def test_a_part_of_backward_then_all_of_it(device):
    on, off = pair(device)
    results = []
    for model in (on, off):
        loss = model(**batch(99, device)).loss
        weight = model.model.layers[0].self_attn.k_proj.weight
        results.append([*torch.autograd.grad(loss, [weight], retain_graph=True), *torch.autograd.grad(loss, [weight])])
    assert_equal(*results)


def test_double_backward_is_as_without(device, monkeypatch):
    """On the references, which can be differentiated twice."""
    monkeypatch.setattr(launch, "enabled", False)
    results = []
    for model in pair(device):
        weights = [layer.mlp.gate_proj.weight for layer in model.model.layers]
        logits = model(input_ids=batch(99, device)["input_ids"]).logits
        first = torch.autograd.grad(logits.square().mean(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters())[1:-1]))
    assert_equal(*results)


@pytest.mark.parametrize("tracked", [True, False])
def test_an_output_changed_in_place_is_kept(device, tracked):
    def double(module, args, output):
        with torch.set_grad_enabled(tracked):
            output.mul_(2)

    on, off = pair(device)
    for model in (on, off):
        model.model.layers[0].input_layernorm.register_forward_hook(double)
    assert_equal(step(on), step(off))
    saved = LAYERS * (2 * H + WIDTH) * TOKENS - 2 * LAYERS * H
    assert kept(off) - kept(on) < saved * 4, "the changed output was not kept"


def test_an_output_that_was_given_other_data_is_kept(device):
    def double(module, args, output):
        output.data = 2 * output.data

    on, off = pair(device)
    for model in (on, off):
        model.model.layers[0].input_layernorm.register_forward_hook(double)
    assert_equal(step(on), step(off))


def test_an_output_changed_before_it_is_cast_is_kept(device):
    def double(module, args, output):
        with torch.no_grad():
            output.mul_(2)

    on, off = pair(device)
    for model in (on, off):
        model.model.layers[1].post_attention_layernorm.register_forward_hook(double)

    def call(model):
        def forward(**inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return model(**inputs).loss

        return forward

    assert_equal(step(on, call(on)), step(off, call(off)))


def test_a_changed_input_is_an_error_as_it_is_without(device):
    for model in pair(device):
        inputs = []
        model.model.layers[1].input_layernorm.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0])
        )
        loss = model(**batch(99, device)).loss
        with torch.no_grad():
            inputs[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_changed_weight_is_an_error_as_it_is_without(device):
    for model in pair(device):
        loss = model(**batch(99, device)).loss
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_norm_reads_its_weight_as_it_was(device):
    """FSDP and ZeRO-3 may have emptied it by then."""
    on, off = pair(device)
    loss = on(**batch(99, device)).loss
    weight = on.model.layers[0].input_layernorm.weight
    before, weight.data = weight.data, torch.empty(0, device=device)
    k_proj = on.model.layers[0].self_attn.k_proj.weight
    (ours,) = torch.autograd.grad(loss, [k_proj])
    weight.data = before
    theirs = torch.autograd.grad(off(**batch(99, device)).loss, [off.model.layers[0].self_attn.k_proj.weight])
    assert_equal([ours], theirs)


def test_report_and_undo(device):
    model = llama(device)
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    with apply(model, recompute=True) as patch:
        assert [(s.name, s.kind, s.cls) for s in patch.swapped if s.kind == "recompute"] == [
            ("model", "recompute", "LlamaModel")
        ]
        assert "recompute  1 × LlamaModel → the outputs of its norms" in str(patch)
        model(**batch(99, device)).loss.backward()
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    assert all(s.kind != "recompute" for s in apply(model).swapped), "it is off unless asked for"


def test_added_to_a_model_that_is_patched(device):
    model, reference = llama(device), llama(device)
    before = [type(m) for m in model.modules()]
    first = apply(model)
    apply(reference)
    size = kept(model)
    second = apply(model, recompute=True)
    assert [s.kind for s in second.swapped] == ["recompute"]
    assert kept(model) < size
    assert_equal(step(model), step(reference))
    assert apply(model, recompute=True).swapped == []
    first.undo()
    second.undo()
    assert [type(m) for m in model.modules()] == before


def test_asked_for_where_it_cannot_be_had(device):
    model = llama(device)
    with pytest.raises(ValueError, match="recompute=True was asked for and can be applied nowhere"):
        apply(model, norm=False, mlp=False, recompute=True)
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="recompute=True .*its forward was replaced on the instance"):
        apply(model, recompute=True)
    assert type(model.model) is LlamaModel


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(device, how):
    on, off = pair(device)
    twin = copy.deepcopy(on) if how == "deepcopy" else pickle.loads(pickle.dumps(on))
    assert type(twin.model) is type(on.model) is not LlamaModel
    assert_equal(step(twin), step(off))
    assert all(p.grad is None for p in on.parameters())
    assert kept(twin) == kept(on)


def test_several_models(device):
    """Two forwards before two backwards; one model inside the other's forward."""
    one, two = (pair(device)[0] for _ in range(2))
    off = pair(device)[1]
    losses = [model(**batch(99, device)).loss for model in (one, two, one)]
    for loss in reversed(losses):
        loss.backward()
    expected = step(off)[1:]
    assert_equal([p.grad / 2 for p in one.parameters()], expected)
    assert_equal([p.grad for p in two.parameters()], expected)
    inner = []
    handle = one.model.layers[1].register_forward_pre_hook(lambda *_: inner.append(two(**batch(99, device)).loss))
    assert_equal(step(one)[1:], expected)
    handle.remove()
    two.zero_grad()
    inner[0].backward()
    assert_equal([p.grad for p in two.parameters()], expected)


def test_an_exception_leaves_nothing_behind(device):
    model = pair(device)[0]

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**batch(99, device))
    assert recompute._state.region is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    handle.remove()
    assert_equal(step(model), step(pair(device)[1]))


def test_without_gradients_no_region_is_opened(device, monkeypatch):
    model = pair(device)[0]
    monkeypatch.setattr(recompute, "_Region", lambda: pytest.fail("a region was opened"))
    with torch.no_grad():
        model(**batch(99, device))
    with torch.inference_mode():
        model(**batch(99, device))


def test_a_frozen_model_keeps_nothing(device):
    on, off = pair(device)
    for model in (on, off):
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_()
    assert kept(on) == kept(off)
