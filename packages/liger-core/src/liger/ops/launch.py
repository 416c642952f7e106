"""Where a kernel runs, and how it is started at little cost to the host.

Every op asks `runs_kernels` and starts its kernels through `launch`. Triton is imported here and nowhere else, so that
the ops import, and run their references, on a platform that has no Triton.

A small batch is bound by the host. Triton works out at every launch which of its compiled variants fits the arguments;
that costs as much as the launch itself. `launch` keeps the variant that Triton chose, under everything that its choice
depends on, and starts it directly the next time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from liger.disabled import DISABLED

if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # macOS and Windows have no Triton: the references run there.
        triton = tl = None

__all__ = [
    "INTERPRETED", "enabled", "is_seen_through", "jit", "l2_bytes", "launch", "may_look_at", "next_power_of_2",
    "runs_kernels", "shared_bytes", "sm_count", "tl", "triton",
]  # fmt: skip

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors. Triton reads the variable when a kernel is defined."""

enabled = not DISABLED
"""Set to False to run the references on every device, as tests do."""

# Of torch's own, and without another name: who follows the operations is not asked of a torch that has them no more.
_transforms_are_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_dispatch_mode: Callable[[Any], Any] = getattr(torch._C, "_get_dispatch_mode", lambda _: None)
_PROXIES = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)  # make_fx

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)
_IS_ROCM = torch.version.hip is not None
_MOST_WARPS = 16 if _IS_ROCM else 32  # a program has at most 1024 threads, and an AMD Instinct's warp has 64
_MOST_VARIANTS = 4096  # of strides that change with every batch, say: a new one is then found by Triton again

_varying: dict[int, tuple[int, ...]] = {}  # by id: a kernel's own hash is that of its source
_registers: dict[int, int] = {}
_variants: dict[tuple[Any, ...], Any] = {}


def jit(*, varying: tuple[str, ...], registers: int | None = None) -> Callable[[Callable[..., None]], Any]:
    """`triton.jit`, or nothing where there is no Triton and nothing will launch the kernel.

    `varying` names the arguments that change from batch to batch (row counts, mostly): Triton must not compile a
    variant for values of them that are 1 or divisible by 16. `registers` is how many a thread may have on an NVIDIA
    GPU, for a kernel that is faster when more of its programs fit a multiprocessor.
    """

    def decorate(function: Callable[..., None]) -> Any:
        if triton is None:
            return function
        kernel = triton.jit(do_not_specialize=varying)(function)
        _varying[id(kernel)] = tuple(at for at, name in enumerate(kernel.arg_names) if name in varying)
        if registers is not None and torch.version.cuda is not None:
            _registers[id(kernel)] = registers
        return kernel

    return decorate


def runs_kernels(x: Tensor, *others: Tensor | None) -> bool:
    """Whether `x` takes the Triton kernels: fp32, bf16 or fp16, on a GPU (or on the CPU in Triton's interpreter).

    So must the `others` that the kernel reads, where there are any. A tensor subclass (DTensor, a quantised tensor)
    does not: its memory is not what its shape says. Nor do any inside `torch.func`'s transforms, forward-mode
    differentiation, `torch.jit.trace` and `make_fx`. The references are torch operations, which all of these know.
    """
    for t in (x, *others):
        if t is not None and (t.dtype not in _KERNEL_DTYPES or type(t) not in _PLAIN):
            return False
    is_there = triton is not None and enabled and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))
    return is_there and not is_seen_through()


def is_seen_through() -> bool:
    """Whether somebody other than a compiler follows the operations that run now, one by one."""
    return not torch.compiler.is_compiling() and (
        _transforms_are_active()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or (_PROXIES is not None and _dispatch_mode(_PROXIES) is not None)
    )


def may_look_at(values: Tensor) -> bool:
    """Whether the values of a tensor are there and looking costs no synchronisation.

    That is on the CPU, not of a FakeTensor, and where neither a compiler nor anybody else follows the operations.
    """
    is_there = values.device.type == "cpu" and type(values) in _PLAIN
    return is_there and not torch.compiler.is_compiling() and not is_seen_through()


def launch(kernel: Any, grid: tuple[int], *args: Any, num_warps: int, **constexprs: Any) -> None:
    """Start a `grid` of programs of `kernel` on the device of its first argument, whichever device is current.

    `args` are the arguments in order, tensors (or None) before numbers, the first of them a tensor; `constexprs` the
    compile-time ones, in the order of the signature.
    """
    num_warps = min(num_warps, _MOST_WARPS)
    if INTERPRETED or torch.compiler.is_compiling():
        kernel[grid](*args, **constexprs, num_warps=num_warps)
        return
    device = args[0].device.index
    if device == torch.cuda.current_device():
        _launch_here(kernel, grid, device, num_warps, args, constexprs)
    else:
        with torch.cuda.device(device):
            _launch_here(kernel, grid, device, num_warps, args, constexprs)


def _launch_here(
    kernel: Any, grid: tuple[int], device: int, num_warps: int, args: tuple[Any, ...], constexprs: dict[str, Any]
) -> None:
    started = [*args, *constexprs.values()]
    key = [*started, num_warps, device, id(kernel)]
    at = 0
    for arg in args:
        if arg is not None:
            if not isinstance(arg, Tensor):
                break
            pointer = arg.data_ptr()
            started[at] = pointer  # Triton would ask the tensor, and then the driver whether that is a GPU's address
            key[at] = (arg.dtype, pointer & 15) if pointer & 15 else arg.dtype
            if _IS_ROCM:  # Triton addresses what lies in less than 2 GiB with 32 bits there
                key[at] = key[at], arg.untyped_storage().size() < 2**31
        at += 1
    for number in _varying[id(kernel)]:
        if number >= at:
            key[number] >>= 31  # what does not fit 32 bits is another type
    known = tuple(key)
    variant = _variants.get(known)
    if variant is not None:
        variant[(grid[0], 1, 1)](*started)
        return
    registers = _registers.get(id(kernel))
    most = {} if registers is None else {"maxnreg": registers}
    variant = kernel[grid](*args, **constexprs, num_warps=num_warps, **most)
    if any(isinstance(arg, Tensor) for arg in args[at:]):
        raise TypeError(f"{kernel.__name__}: a tensor comes after {kernel.arg_names[at]}, which is a number")
    if kernel.arg_names[len(args) :] != list(constexprs):
        raise TypeError(f"{kernel.__name__}: constexprs {list(constexprs)}, expected {kernel.arg_names[len(args) :]}")
    if hasattr(variant, "__getitem__"):  # a Triton whose launch returns nothing to start again is asked each time
        if len(_variants) >= _MOST_VARIANTS:
            _variants.clear()
        _variants[known] = variant


def sm_count(x: Tensor) -> int:
    """Streaming multiprocessors of the device of `x`; 4 in the interpreter, which runs programs one by one."""
    return torch.cuda.get_device_properties(x.device.index).multi_processor_count if x.is_cuda else 4


def shared_bytes(x: Tensor) -> int:
    """The shared memory that tiles may wait in: what one program may have, less 1 KiB for a kernel's reductions."""
    if not x.is_cuda:
        return 96 * 2**10
    properties = torch.cuda.get_device_properties(x.device.index)
    # "optin" is what an NVIDIA kernel gets when it asks for more than every program may have; not every torch knows it
    usual = getattr(properties, "shared_memory_per_block", 48 * 2**10)
    return int(getattr(properties, "shared_memory_per_block_optin", usual)) - 2**10


def l2_bytes(x: Tensor) -> int:
    """The size of the L2 cache of the device of `x`; 0 in the interpreter, and where torch does not know."""
    return int(getattr(torch.cuda.get_device_properties(x.device.index), "L2_cache_size", 0)) if x.is_cuda else 0


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, for `n` ≥ 1."""
    return 1 << (n - 1).bit_length()
