"""tanh in a kernel.

From exp alone, tanh of a small x would have an absolute error of one rounding of 1: there it is Cephes' polynomial.
"""

from __future__ import annotations

from liger.ops.launch import jit, tl


@jit(varying=())
def tanh(x):  # noqa: ANN201
    """Of fp32 numbers, in fp32."""
    square = x * x
    small = -5.70498872745e-3 * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * x + x
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)
