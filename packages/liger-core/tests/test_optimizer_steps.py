"""Steps of optimizers that write past the version counter, as those with kernels of their own do."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from liger import optimizer_steps
from liger.optimizer_steps import StepsSince


class PastTheVersions(torch.optim.Optimizer):
    """Writes through `.data`."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(2)


def test_logits_read_after_a_step_are_refused(pair, inputs):
    patched = pair[1]
    optimizer = PastTheVersions(patched.parameters())
    outputs = patched(**inputs)
    outputs.loss.backward()
    version = patched.lm_head.weight._version
    optimizer.step()
    assert patched.lm_head.weight._version == version
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        outputs.logits + 0


def test_logits_read_before_the_step_or_after_anothers_are_the_models(pair, inputs):
    stock, patched = pair
    other = PastTheVersions([nn.Parameter(torch.ones(2))])
    others_head = PastTheVersions(stock.lm_head.parameters())
    outputs = patched(**inputs)
    expected = stock(**inputs).logits
    other.step()
    others_head.step()
    torch.testing.assert_close(outputs.logits + 0, expected)


def test_only_later_steps_of_its_own_parameters_count():
    mine, others = (nn.Parameter(torch.ones(2)) for _ in range(2))
    early, late, foreign = (PastTheVersions([p]) for p in (mine, mine, others))
    StepsSince()  # the first one begins to watch
    early.step()
    steps = StepsSince(mine, None)
    foreign.step()
    assert steps.any()
    assert not steps.changed(got_gradients=True)
    late.step()
    assert steps.changed(got_gradients=False)
    assert not StepsSince(mine).changed(got_gradients=True)


def test_a_step_of_any_counts_for_a_parameter_that_got_gradients_and_that_no_optimizer_holds():
    """A shard of it may be held, or a copy in fp32."""
    mine, copy = (nn.Parameter(torch.ones(2)) for _ in range(2))
    steps = StepsSince(mine)
    PastTheVersions([copy]).step()
    assert steps.changed(got_gradients=True)
    assert not steps.changed(got_gradients=False)


def test_a_frozen_parameter_is_not_changed_by_an_optimizer_that_holds_it():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer, steps = PastTheVersions([frozen, nn.Parameter(torch.ones(2))]), StepsSince(frozen)
    optimizer.step()
    assert not steps.changed(got_gradients=True)


def test_no_optimizer_and_no_parameter_is_kept_alive():
    parameter, another = (nn.Parameter(torch.ones(2)) for _ in range(2))
    StepsSince(parameter)
    optimizer, next_one = PastTheVersions([parameter]), PastTheVersions([another])
    optimizer.step()
    steps, held = StepsSince(parameter), weakref.ref(optimizer)
    del optimizer, parameter
    gc.collect()
    assert held() is None
    assert not steps.changed(got_gradients=True)
    next_one.step()
    assert all(ref() is not None for ref, _ in optimizer_steps._last_step.values())


def test_an_optimizer_that_cannot_be_hashed():
    class Unhashable(PastTheVersions):
        __hash__ = None

    parameter = nn.Parameter(torch.ones(2))
    steps = StepsSince(parameter)
    Unhashable([parameter]).step()
    optimizer = Unhashable([parameter])
    optimizer.step()
    assert steps.changed(got_gradients=True)


def test_logits_read_after_a_compiled_step_of_a_fused_optimizer_are_refused(pair, inputs):
    """Its kernel counts no version either."""
    patched = pair[1]
    optimizer = torch.optim.SGD(patched.parameters(), lr=0.5, fused=True)
    outputs = patched(**inputs)
    outputs.loss.backward()
    torch.compile(optimizer.step, backend="eager")()
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        outputs.logits + 0
