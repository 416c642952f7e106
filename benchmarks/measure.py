"""How a figure is taken. benchmarks/README.md says what each means."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, Problem
from benchmarks.exact import as_tuple, differentiated, errors

PROFILED = 8
"""Calls that the profiler sees, for one figure of GPU time."""
REST = 0.5
"""Seconds for which the GPU does nothing before a figure is taken. Large products run at its power limit: whoever came
after a peer that heats it would seem slower."""

Record = dict[str, Any]


def _rest() -> None:
    torch.cuda.synchronize()
    time.sleep(REST)


def gpu_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of kernels, copies and fills on the GPU that one call starts, the mean of a few."""
    call()
    _rest()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for _ in range(PROFILED):
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    on_device = (e["dur"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"))
    return sum(on_device) / 1e3 / PROFILED


def wall_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds that a call takes from start to end, the median."""
    if device.type == "cuda":
        from triton.testing import do_bench

        call()
        _rest()
        return float(do_bench(call, warmup=10, rep=50, return_mode="median"))
    call()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def host_us(function: Callable[..., Any], problems: list[Problem], repeats: int = 8) -> float:
    """Microseconds of the host for one forward and backward, at sizes so small that the device is never waited for.

    Many calls before one backward through all of them, as in a model: one call and its backward alone would be mostly
    the waking of autograd's thread. The median of several rounds, divided by the number of calls.
    """
    wrt = [problem.inputs[name] for problem in problems for name in problem.wrt]
    times = []
    for _ in range(repeats + 2):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        roots = [_roots(as_tuple(function(**problem.inputs)), problem) for problem in problems]
        upstream = None if roots[0][1] is None else [g for _, given in roots for g in given or ()]
        torch.autograd.grad([output for outputs, _ in roots for output in outputs], wrt, upstream)
        times.append((time.perf_counter() - began) / len(problems))
    return statistics.median(times[2:]) * 1e6


def peak_mib(call: Callable[[], Any]) -> float:
    """MiB that a call allocates at its worst moment, beside what was there before: outputs and gradients count."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def copy_tb_s(device: torch.device) -> float:
    """TB/s of a copy from the device to itself, reading and writing counted."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_ms(lambda: target.copy_(source)) / 1e9


def product_tflop_s(device: torch.device) -> float:
    """TFLOP/s of a large bf16 product."""
    left = torch.randn(8192, 4096, device=device, dtype=torch.bfloat16)
    right = torch.randn(4096, 32768, device=device, dtype=torch.bfloat16)
    return 2 * 8192 * 4096 * 32768 / gpu_ms(lambda: left @ right) / 1e9


def _problem(case: Case, sizes: tuple[int, ...], device: torch.device) -> Problem:
    torch.manual_seed(0)
    problem = case.make(sizes, device)
    for name in problem.wrt:
        problem.inputs[name].requires_grad_()
    return problem


def _roots(outputs: tuple[Tensor, ...], problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
    """What is differentiated, and its upstream gradients; a loss has none."""
    return (outputs, None) if problem.upstream is None else differentiated(outputs, problem.upstream)


def _forward_backward(function: Callable[..., Any], problem: Problem) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    inputs = problem.inputs
    outputs = as_tuple(function(**inputs))
    roots, upstream = _roots(outputs, problem)
    return outputs, torch.autograd.grad(roots, [inputs[name] for name in problem.wrt], upstream)


def _errors(function: Callable[..., Any], case: Case, device: torch.device) -> dict[str, float]:
    # Some peers write into what they are given, so the errors are taken against inputs that they have not seen.
    outputs, gradients = _forward_backward(function, _problem(case, case.sizes, device))
    return errors(case, _problem(case, case.sizes, device), outputs, gradients)


def measure(case: Case, load: Callable[[], Callable[..., Any]], device: torch.device) -> Record:
    """Every figure of one peer at one case."""
    function = load()
    on_gpu = device.type == "cuda"
    record: Record = {"error": _errors(function, case, device)}
    problem = _problem(case, case.sizes, device)

    def forward() -> Any:
        return function(**problem.inputs)

    def both() -> Any:
        return _forward_backward(function, problem)

    record["wall_forward_ms"] = wall_ms(forward, device)
    record["wall_ms"] = wall_ms(both, device)
    record["gpu_forward_ms"] = gpu_ms(forward) if on_gpu else None
    record["gpu_ms"] = gpu_ms(both) if on_gpu else None
    record["peak_mib"] = peak_mib(both) if on_gpu else None
    record["host_us"] = host_us(function, [_problem(case, case.tiny, device) for _ in range(20)])
    return record


def or_say_why(figures: Callable[[], Record], device: torch.device) -> Record:
    """The figures, or what went wrong: a peer that fails at a shape, for want of memory say, is a result."""
    try:
        return figures()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_or_say_why(case: Case, name: str, device: torch.device) -> Record:
    """`measure`, or what went wrong."""
    torch._dynamo.reset()
    return or_say_why(lambda: measure(case, case.peers[name], device), device)
