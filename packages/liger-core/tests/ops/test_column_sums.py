"""The sums of one gradient's parts, or of two at once, each in its own dtype."""

from __future__ import annotations

import pytest
import torch

from liger.ops.column_sums import column_sums

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("columns", [1, 31, 96, 100])
@pytest.mark.parametrize("programs", [0, 1, 3, 130])
def test_two_parts_in_two_dtypes_are_as_one_and_one(device, programs, columns):
    pytest.importorskip("triton")
    partial = torch.randn(programs, 2, columns, device=device)
    both = column_sums(partial, *DTYPES)
    for part, (sums, dtype) in enumerate(zip(both, DTYPES, strict=True)):
        assert sums.dtype == dtype
        assert sums.shape == (columns,)
        torch.testing.assert_close(sums, partial[:, part].double().sum(0).to(dtype), rtol=2**-7, atol=1e-5)
        (alone,) = column_sums(partial[:, part].contiguous(), dtype)
        torch.testing.assert_close(sums, alone)
