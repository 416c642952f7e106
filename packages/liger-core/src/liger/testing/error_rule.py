"""The one tolerance rule: an op may be off by at most 1.5 times what torch's own implementation is off by.

Both are measured against the same computation in fp64, as a relative error in the 2-norm over the whole tensor. What
torch gets exactly right leaves no room, so a floor is added: well under one rounding of the dtype, for each of the
`depth` ops that lie between the input and the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 1.5
FLOOR = {torch.float64: 1e-13, torch.float32: 5e-7, torch.float16: 1e-4, torch.bfloat16: 8e-4}


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in fp64; the absolute norm where `exact` is zero. NaN where either side has one."""
    actual, exact = actual.detach().double().cpu(), exact.detach().double().cpu()
    norm = exact.norm().item()
    return (actual - exact).norm().item() / (norm or 1.0)


def assert_as_exact_as(
    actual: Tensor,
    own: Tensor,
    exact: Tensor,
    what: str = "result",
    *,
    depth: int = 1,
    computed_in: torch.dtype | None = None,
) -> None:
    """Fail unless `actual` is as near to `exact` (fp64) as torch's `own` result of the same dtype, by that rule.

    `computed_in` names the dtype of the computation where the result's is wider: a loss in fp32 of a model in bf16.
    """
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == own.dtype, f"{what}: dtype {actual.dtype}, expected {own.dtype}"
    floor = FLOOR[computed_in or actual.dtype] * depth**0.5
    error, allowed = relative_error(actual, exact), FACTOR * relative_error(own, exact) + floor
    assert error <= allowed, f"{what}: relative error {error:.3g}, allowed {allowed:.3g}"
