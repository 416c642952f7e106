"""Compiles the kernels that the ops start for a GPU that need not be there, and prints what each asks of it, as JSON.

    python compiled_kernels.py cuda 89 99

The last number is how many KiB of shared memory a program may have there. It runs without Triton's interpreter, in a
process of its own: Triton decides for one or the other when it is imported.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import liger.ops
from liger.ops import launch as launching

TARGETS = {"cuda": (int, 32), "hip": (str, 64)}

backend, architecture, shared = sys.argv[1:]
parse, warp_size = TARGETS[backend]
target = GPUTarget(backend, parse(architecture), warp_size)
types = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.bool: "*i1",
}  # fmt: skip
compiled: dict[tuple[Any, ...], dict[str, Any]] = {}


def type_of(arg: Any) -> str:
    """What Triton would make of an argument that it does not specialise on."""
    if isinstance(arg, Tensor):
        return types[arg.dtype]
    if isinstance(arg, float):
        return "fp32"
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


def compile_instead(kernel: Any, grid: tuple[int], *args: Any, num_warps: int, **constexprs: Any) -> None:
    """Stands for `launch`: compiles the variant for these arguments (on AMD, for tensors of 2 GiB and more)."""
    names, varying = kernel.arg_names, launching._varying[id(kernel)]
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    signature = dict.fromkeys(names, "constexpr")
    attributes = {}
    for at, arg in enumerate(args):
        if arg is None or (isinstance(arg, int) and arg == 1 and at not in varying):
            constants[at,] = arg
            continue
        signature[names[at]] = type_of(arg)
        if at not in varying and (isinstance(arg, Tensor) or (isinstance(arg, int) and arg % 16 == 0)):
            attributes[at,] = [["tt.divisibility", 16]]
    options: dict[str, Any] = {"num_warps": min(num_warps, 16) if backend == "hip" else num_warps}
    if backend == "cuda" and id(kernel) in launching._registers:
        options["maxnreg"] = launching._registers[id(kernel)]
    key = (kernel.__name__, *signature.items(), *sorted(constants.items()), *sorted(attributes), *options.items())
    if key in compiled:
        return
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)
    compiled[key] = {
        "kernel": f"{kernel.__module__}.{kernel.__name__}",
        "constexprs": constexprs,
        "shared": result.metadata.shared,
        "threads": options["num_warps"] * warp_size,
    }


for found in pkgutil.iter_modules(liger.ops.__path__, "liger.ops."):
    module = importlib.import_module(found.name)
    stand_ins: dict[str, Callable[..., Any]] = {
        "launch": compile_instead,
        "runs_kernels": lambda x, *others: x.dtype != torch.float64,
        "shared_bytes": lambda x: (int(shared) - 1) * 2**10,
        "l2_bytes": lambda x: 50 * 2**20,
    }
    for name, stand_in in stand_ins.items():
        if name in vars(module) and module is not launching:
            setattr(module, name, stand_in)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Memory that nobody reads: no kernel runs."""
    return [torch.empty(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def differentiate(outputs: Any) -> None:
    """Forward has compiled its kernels; backward does."""
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y.requires_grad]
    torch.autograd.backward(outputs, [torch.empty_like(y) for y in outputs])


fp32, bf16 = torch.float32, torch.bfloat16
for columns in (96, 2048, 4096, 8192, 16384, 40000):
    alike = [(fp32, fp32)] if columns in (2048, 8192) else [(bf16, bf16)]
    for dtype, weight_dtype in [*alike, (fp32, fp32), (bf16, fp32)] if columns == 4096 else alike:
        x, residual = tensors((4, columns), (4, columns), dtype=dtype)
        weight, bias = tensors((columns,), (columns,), dtype=weight_dtype)
        differentiate(liger.ops.rms_norm(x, weight))
        differentiate(liger.ops.add_rms_norm(x, residual, weight))
        if columns <= 16384:
            differentiate(liger.ops.layer_norm(x, weight, bias))
for op in (liger.ops.swiglu, liger.ops.geglu, lambda gate, up: liger.ops.geglu(gate, up, "none")):
    differentiate(op(*tensors((4, 4096), (4, 4096))))
differentiate(liger.ops.swiglu_joined(*tensors((4, 8192))))
for columns, rotated in ((64, 64), (96, 24), (128, 128), (256, 256)):
    q, k, q_weight, k_weight = tensors((1, 4, 8, columns), (1, 4, 2, columns), (columns,), (columns,))
    cos, sin = torch.empty(1, 4, rotated, dtype=bf16), torch.empty(1, 4, rotated, dtype=bf16)
    differentiate(liger.ops.rotary(q, k, cos, sin, unsqueeze_dim=2))
    differentiate(liger.ops.qk_norm_rotary(q, k, q_weight, k_weight, cos, sin))
for dtype, heads, kv_heads in ((fp32, 64, 2), (torch.float16, 128, 4)):
    q, k = tensors((1, 4, heads, 128), (1, 4, kv_heads, 128), dtype=dtype)
    angles = torch.empty(1, 4, 128, dtype=dtype)
    differentiate(liger.ops.qk_norm_rotary(q, k, *tensors((128,), (128,), dtype=dtype), angles, angles))
target_ids = torch.zeros(4, dtype=torch.int64)
for classes in (1000, 32000, 128256):
    for dtype, options in ((bf16, {}), (fp32, {"softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1})):
        (logits,) = tensors((4, classes), dtype=dtype)
        differentiate(liger.ops.cross_entropy(logits, target_ids, **options))
    hidden, weight, wider, teacher = tensors((4, 8), (classes, 8), (4, 16), (classes, 16))
    for capped in ({}, {"softcap": 30.0}):
        differentiate(liger.ops.linear_log_prob(hidden, weight, target_ids, **capped)[:2])
        both = {f"{side}_{name}": cap for side in ("student", "teacher") for name, cap in capped.items()}
        for beta in (0.0, 0.5, 1.0):
            differentiate(liger.ops.linear_distillation(hidden, weight, wider, teacher, beta=beta, **both))
sys.stdout.write(json.dumps(list(compiled.values())))
