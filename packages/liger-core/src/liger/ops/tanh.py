"""tanh in a kernel, and its derivative.

From exp alone, tanh of a small x would have an absolute error of one rounding of 1: there it is Cephes' polynomial. The
derivative is not 1 − tanh², which loses its digits where tanh is near ±1.
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
    large = 1.0 - _rest(x)
    large = tl.where(x < 0.0, -large, large)
    return tl.where(tl.abs(x) < 0.625, small, large)


@jit(varying=())
def tanh_derivative(x):  # noqa: ANN201
    """(1 − tanh|x|) (1 + tanh|x|) of fp32 numbers, in fp32."""
    rest = _rest(x)
    return rest * (2.0 - rest)


@jit(varying=())
def _rest(x):
    """1 − tanh|x|."""
    return 2.0 / (1.0 + tl.exp(2.0 * tl.abs(x)))
