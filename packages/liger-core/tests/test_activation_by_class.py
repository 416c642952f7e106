"""`GatedMLP(act=None)`: a module without a config, whose activation says by its class what it computes."""

from __future__ import annotations

import copy

import pytest
from torch import nn

from adapted_models import LLAMA, llama
from liger.adapter import Adapter
from liger.layers import GatedMLP
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch

BY_CLASS = Adapter(modeling=LLAMA.modeling, modules={"LlamaMLP": GatedMLP(act=None)}, head=LLAMA.head)


def without_config(device, act_fn):
    model = llama(device)
    for layer in model.model.layers:
        del layer.mlp.config
        layer.mlp.act_fn = act_fn
    return model


@pytest.mark.parametrize(("act_fn", "op"), [(nn.SiLU(), "swiglu"), (nn.GELU(), None), (nn.ReLU(), None)])
def test_what_it_runs(device, path, act_fn, op):
    stock = without_config(device, act_fn)
    patched = copy.deepcopy(stock)
    patch = apply_adapters(patched, [BY_CLASS])
    assert {s.runs for s in patch.swapped if s.kind == "mlp"} == ({op} if op else set())
    reason = f"its act_fn is a {type(act_fn).__name__}, which has no kernel"
    assert {d.reason for d in patch.declined} == (set() if op else {reason})
    assert_same_step(patched, stock, in_fp64(stock), batch(TINY["vocab_size"], device))


def test_a_module_without_an_activation_is_declined(device):
    model = without_config(device, None)
    assert {d.reason for d in apply_adapters(model, [BY_CLASS]).declined} == {"has no act_fn"}


def test_a_class_that_computes_something_else_now_is_declined(device, monkeypatch):
    model = llama(device)
    monkeypatch.setattr(type(model.model.layers[0].mlp.act_fn), "forward", lambda self, x: x.relu())
    reasons = {d.reason for d in apply_adapters(model, [BY_CLASS]).declined}
    assert len(reasons) == 1
    assert reasons.pop().startswith("of its act_fn SiLUActivation.forward was replaced by ")


def test_a_hook_on_the_activation_is_declined(device):
    act_fn = nn.SiLU()
    act_fn.register_forward_hook(lambda *_: None)
    model = without_config(device, act_fn)
    reasons = {d.reason for d in apply_adapters(model, [BY_CLASS]).declined}
    assert reasons == {"a hook on its act_fn wants to be called"}
