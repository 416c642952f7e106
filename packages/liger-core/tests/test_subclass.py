"""The classes that are swapped in: made once, and made again where what they were made of is another."""

from __future__ import annotations

import pytest
from transformers.models.llama import modeling_llama

from adapted_models import LLAMA, llama
from liger.patch import apply_adapters
from liger.testing.tiny import batch

pytestmark = pytest.mark.usefixtures("no_interpreter")


def apply(model):
    return apply_adapters(model, [LLAMA])


def test_a_function_that_was_replaced_since_another_model_was_patched_runs(device, monkeypatch):
    apply(llama(device))
    attention, calls = modeling_llama.eager_attention_forward, []

    def counted(*args, **kwargs):
        calls.append(None)
        return attention(*args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", counted)
    model = llama(device)
    apply(model)
    model(**batch(99, device))
    assert len(calls) == len(model.model.layers)


def test_models_of_one_type_share_their_classes(device):
    first, second = llama(device), llama(device)
    apply(first)
    apply(second)
    assert [type(m) for m in first.modules()] == [type(m) for m in second.modules()]
