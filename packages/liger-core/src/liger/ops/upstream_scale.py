"""What backward has left to do where forward has computed the gradients: multiply them by the upstream gradient.

That is a scalar, mostly exactly 1, and the host must not wait to look. So a kernel looks, and returns at once where
there is nothing to do; elsewhere it multiplies in place, since a second copy of a head's gradient is a gigabyte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from liger.ops.launch import jit, launch, runs_kernels, sm_count, tl

_BLOCK = 4096


@jit(varying=("upstream", "denominator", "rows"))
def _scale_kernel(buffer, upstream, denominator, rows, columns, HAS_DENOMINATOR: tl.constexpr, BLOCK: tl.constexpr):
    factor = tl.load(upstream).to(tl.float32)
    if HAS_DENOMINATOR:
        factor /= tl.load(denominator).to(tl.float32)
    if factor != 1.0:
        size = rows.to(tl.int64) * columns
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            x = tl.load(buffer + at, mask=at < size)
            tl.store(buffer + at, (x.to(tl.float32) * factor).to(buffer.dtype.element_ty), mask=at < size)


def scaled(buffer: Tensor, upstream: Tensor, denominator: Tensor | None) -> Tensor:
    """`buffer` · upstream / denominator: in the buffer itself, which costs nothing where the factor is exactly 1.

    Out of place in the reference, and under torch.compile, which fuses it and must not see a saved tensor change.
    What is done to the result in place afterwards is nothing that autograd need know of the saved `buffer`: a second
    backward computes it again.
    """
    if torch.compiler.is_compiling() or not runs_kernels(buffer):
        factor = upstream if denominator is None else upstream / denominator
        return (buffer.to(torch.promote_types(buffer.dtype, torch.float32)) * factor).to(buffer.dtype)
    if buffer.numel():
        columns = buffer.shape[-1]
        programs = min(-(-buffer.numel() // _BLOCK), 16 * sm_count(buffer))
        launch(
            _scale_kernel, (programs,), buffer, upstream, denominator, buffer.numel() // columns, columns,
            HAS_DENOMINATOR=denominator is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return buffer.data


def early_and_late(denominator: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """What a gradient of this dtype is divided by in forward, and what in backward.

    In fp16 the quotient would underflow before a GradScaler's factor arrives with the upstream gradient. There only the
    denominator's mantissa is divided by in forward; its power of two rounds nothing in backward, nor does the scaler's.
    """
    if denominator is None or dtype != torch.float16:
        return denominator, None
    mantissa, exponent = torch.frexp(denominator.float())
    return mantissa, torch.ldexp(torch.ones_like(mantissa), exponent)
