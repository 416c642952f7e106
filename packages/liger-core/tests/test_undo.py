"""undo: the model is as it was, copies in it too, and a Patch holds on to nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import weakref

import pytest
import torch

from adapted_models import LLAMA, llama
from liger.layers import RMSNorm
from liger.patch import apply_adapters
from liger.subclass import Swappable

pytestmark = pytest.mark.usefixtures("no_interpreter")


def apply(model, **switches):
    return apply_adapters(model, [LLAMA], **switches)


def patched(model):
    return {name for name, module in model.named_modules() if isinstance(module, Swappable)}


def unpickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copy_of_a_patched_model_can_be_undone_by_itself(device, copied):
    model = llama(device)
    first = apply(model, mlp=False)
    twin = copied(model)
    second = apply(twin, rope=False)
    assert second.already
    assert {s.kind for s in second.swapped} == {"mlp"}
    second.undo()
    assert not patched(twin)
    assert len(patched(model)) == len(first.swapped)
    first.undo()
    assert not patched(model)


def test_a_second_patch_of_a_model_leaves_the_first_ones_modules(device):
    model = llama(device)
    first = apply(model)
    before = patched(model)
    with apply(model):
        pass
    assert patched(model) == before
    first.undo()
    assert not patched(model)


def test_a_layer_that_was_copied_inside_the_model_is_undone_too(device):
    model = llama(device)
    patch = apply(model)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    patch.undo()
    assert not patched(model)


def test_a_copy_beside_another_patchs_modules_is_undone_by_the_patch_of_its_kind(device):
    model = llama(device)
    norms, rest = apply(model, rope=False, mlp=False, loss=None), apply(model, norm=False)
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    rest.undo()
    assert all(name.endswith("norm") for name in patched(model))
    assert "model.layers.2.input_layernorm" in patched(model)
    norms.undo()
    assert not patched(model)


def test_a_patch_does_not_keep_its_model(device):
    model = llama(device)
    patch = apply(model, recompute=True)
    layer, gone = model.model.layers[0], weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert patched(layer)
    patch.undo()
    assert not patched(layer), "what is left of the model is undone"
    patch.undo()


def test_what_is_asked_for_and_cannot_be_had_is_an_error_in_a_patched_model_too(device):
    model = llama(device)
    patch = apply(model)
    with pytest.raises(ValueError, match="experts=True was asked for and can be applied nowhere"):
        apply(model, experts=True)
    assert not apply(model, norm=True, loss="linear").swapped, "it has been applied"
    patch.undo()


def test_a_module_that_two_parts_of_an_adapter_claim_is_swapped_for_one_and_the_report_says_so(device):
    adapter = dataclasses.replace(LLAMA, modules={**LLAMA.modules, "LlamaAttention": RMSNorm(eps="scaling")})
    model = llama(device)
    for layer in model.model.layers:
        layer.self_attn.named_parameters = lambda: iter(())
    patch = apply_adapters(model, [adapter])
    assert {(d.kind, d.cls, d.reason) for d in patch.declined} == {
        ("rope", "LlamaAttention", "its class is swapped for another part already")
    }
    patch.undo()
    assert not patched(model)
