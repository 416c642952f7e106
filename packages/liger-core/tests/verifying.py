"""Patched tiny models, and kernels broken in ways that only a gradient shows."""

from __future__ import annotations

import dataclasses
import importlib

import torch

import adapted_models
from adapted_models import LLAMA, MIXTRAL
from liger import layers, ops
from liger.patch import apply_adapters


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


def break_norm(monkeypatch):
    monkeypatch.setattr(layers, "rms_norm", lambda x, w, *args, **kw: ops.rms_norm(x, skewed(w), *args, **kw))


def put_gate(monkeypatch, gate):
    """In the place of swiglu's."""
    monkeypatch.setitem(layers._GATES, "silu", gate)
    monkeypatch.setitem(layers._GATE_OF_CLASS, ("transformers.activations", "SiLUActivation"), gate)


def break_mlp(monkeypatch):
    sound = layers._SWIGLU
    gate = dataclasses.replace(
        sound, op=lambda gate, up: sound.op(gate, skewed(up)), joined=lambda gate_up: sound.joined(skewed(gate_up))
    )
    put_gate(monkeypatch, gate)


def break_loss(monkeypatch):
    module = importlib.import_module("liger.ops.linear_cross_entropy")
    monkeypatch.setattr(module, "scaled", lambda *args: 1.02 * sound(*args))
    sound = importlib.import_module("liger.ops.upstream_scale").scaled
