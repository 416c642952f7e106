"""Models that are built from now on: patched until undone, in the order in which the patches came."""

from __future__ import annotations

import pytest

from adapted_models import LLAMA, llama
from liger.apply_liger_kernel import apply_liger_kernel
from liger.subclass import Swappable

pytestmark = pytest.mark.usefixtures("no_interpreter")


def is_patched(model):
    return any(isinstance(module, Swappable) for module in model.modules())


def test_patches_come_off_in_the_opposite_order_or_not_at_all(device):
    apply = apply_liger_kernel(LLAMA)
    first, second = apply(), apply()
    with pytest.raises(RuntimeError, match=r"cannot undo: Llama\w+.__init__ was replaced by something else since"):
        first.undo()
    assert is_patched(llama(device)), "undo must be all or nothing"
    second.undo()
    assert is_patched(llama(device))
    first.undo()
    first.undo()
    assert not is_patched(llama(device))
