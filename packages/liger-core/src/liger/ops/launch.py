"""Where a kernel runs: which tensors take the Triton kernels, and on which device they are launched.

Every op asks `runs_kernels` and starts its kernels through `launch`. Triton is imported here and nowhere else, so that
the ops import, and run their references, on a platform that has no Triton.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS and Windows have no Triton: the references run there.
        triton = tl = None

__all__ = ["INTERPRETED", "enabled", "jit", "launch", "next_power_of_2", "runs_kernels", "sm_count", "tl", "triton"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when a kernel is defined."""

enabled = True
"""Set to False to run the references on every device: for tests, and to find out whether a kernel is at fault."""

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(*, varying: tuple[str, ...]) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit`, or nothing where there is no Triton and nothing will launch the kernel.

    `varying` names the arguments that change from batch to batch (row counts, mostly): Triton must not compile a
    variant for values of them that are 1 or divisible by 16.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=varying)


def runs_kernels(x: Tensor) -> bool:
    """Whether `x` takes the Triton kernels: fp32, bf16 or fp16, on a GPU (or on the CPU in Triton's interpreter)."""
    if triton is None or not enabled or x.dtype not in _KERNEL_DTYPES:
        return False
    return x.is_cuda or (INTERPRETED and x.device.type == "cpu")


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of `x`, whichever device is current, with `x` as its first argument."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](x, *args, **options)
    else:
        kernel[grid](x, *args, **options)


@functools.lru_cache
def _sm_count_of(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def sm_count(x: Tensor) -> int:
    """Streaming multiprocessors of the device of `x`; 4 in the interpreter, which runs programs one by one."""
    return _sm_count_of(x.device.index) if x.is_cuda else 4


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for `n` ≥ 1."""
    return 1 << (n - 1).bit_length()
