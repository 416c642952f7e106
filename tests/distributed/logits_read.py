"""`outputs.logits` read after a loss that never held them, under every strategy: right, or an error that says why."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from data_parallel import STRATEGIES, batches, check_step, in_fp64, on_one_process, wrapped_llama
from pair import RANK, Case, skip_alone

CASES: dict[str, Case] = {}

GONE = "make the head an FSDP unit of its own and read them before backward"

BEFORE_BACKWARD = {
    "ddp": None,
    "fsdp2, root only": None,
    "fsdp2, layers": None,
    "fsdp2, layers and root resharded": GONE,
    "fsdp2, head of its own": None,
    "fsdp2, tied head": None,
    "fsdp1, layers": GONE,
    "zero-3": r"read outputs.logits.detach\(\)",
}
"""None: they are right; else what the error says, when they are read or in their backward."""


def same(logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def before_backward(name: str) -> None:
    if BEFORE_BACKWARD[name]:
        skip_alone()
    strategy, options = STRATEGIES[name]
    stock, wrapped = wrapped_llama(strategy, late=False, **options)
    inputs = batches()
    outputs = wrapped.module(**inputs[RANK])
    if BEFORE_BACKWARD[name]:
        with pytest.raises(RuntimeError, match=BEFORE_BACKWARD[name]):
            outputs.logits.sum().backward()
        if name == "zero-3":
            same(outputs.logits.detach() + 0, stock(**inputs[RANK]).logits)
    else:
        same(outputs.logits + 0, stock(**inputs[RANK]).logits)
    wrapped.backward(outputs.loss)
    own, exact = on_one_process(stock, inputs), on_one_process(in_fp64(stock), inputs)
    check_step((outputs.loss, wrapped.gradients()), own, exact)


def after_backward(name: str) -> None:
    """Where a weight is gathered anew for every call, nobody knows whether it is the one of that forward."""
    strategy, options = STRATEGIES[name]
    stock, wrapped = wrapped_llama(strategy, late=False, **options)
    inputs = batches()[RANK]
    outputs = wrapped.module(**inputs)
    wrapped.backward(outputs.loss)
    if name == "ddp":
        same(outputs.logits + 0, stock(**inputs).logits)
    else:
        with pytest.raises(RuntimeError, match="read them before backward"):
            outputs.logits.detach() + 0


def in_evaluation(name: str) -> None:
    """And the step of training that follows is right."""
    strategy, options = STRATEGIES[name]
    stock, wrapped = wrapped_llama(strategy, late=False, **options)
    inputs = batches()
    for model in (wrapped.module, stock):
        model.eval()
    with torch.no_grad():
        ours, own = wrapped.module(**inputs[RANK]), stock(**inputs[RANK])
    same(ours.loss, own.loss)
    same(ours.logits + 0, own.logits)
    for model in (wrapped.module, stock):
        model.train()
    outputs = wrapped.module(**inputs[RANK])
    wrapped.backward(outputs.loss)
    own, exact = on_one_process(stock, inputs), on_one_process(in_fp64(stock), inputs)
    check_step((outputs.loss, wrapped.gradients()), own, exact)


for _name in BEFORE_BACKWARD:
    CASES[f"logits before backward, {_name}"] = partial(before_backward, _name)
    CASES[f"logits after backward, {_name}"] = partial(after_backward, _name)
    CASES[f"logits in evaluation, {_name}"] = partial(in_evaluation, _name)
