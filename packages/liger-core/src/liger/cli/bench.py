"""`python -m liger bench`: every op by eager PyTorch, torch.compile and Liger, and a training step, on one GPU.

The repository's `benchmarks` measure more, more closely, and beside other libraries. This is what a user runs.

The document: `device`, `versions`, `tiny`, `ops` (`op`, `shape`, `ways`: eager, compile and liger, each `ms` and
`peak_mib` of forward and backward, or `out_of_memory`, or `failed` with the error; `speedup` over eager, or null),
`step` (null where it was not asked for, or `skipped` or `failed` with the reason, or `model_type`, `parameters`,
`batch`, `sequence`, `swapped`, `ways`: eager and liger, each `ms`, `tokens_per_second` and `peak_gib`, and `speedup`),
`left_out` (ops and shapes for which there was no time) and `seconds`. A figure of memory is null without a GPU.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from liger.cli.answer import Answer, RefusalError, Table
from liger.cli.hardware import ops_run, why_no_gpu
from liger.cli.op_cases import CASES, Function, OpCase, Sizes
from liger.cli.report import versions
from liger.cli.training_step import SETTINGS, TINY, family, training_step

Record = dict[str, Any]

_STEP = "step"
_SECONDS = 0.2
"""How long each way of an op is repeated."""


def bench(*, only: list[str] | None = None, tiny: bool = False, seconds: float = 120) -> Answer:
    """Measure, and say on stderr what is being measured. The exit status is 1 where something fails.

    Args:
        only: names of ops, and "step"; None for all.
        tiny: sizes that prove that it runs, on the CPU where there is no GPU. Nothing is compiled.
        seconds: after these no further shape of an op is begun; its first shape and the step are measured anyway.

    Raises:
        RefusalError: an unknown name; no GPU, or kernels that are switched off, without `tiny`.
    """
    names = [*(case.op for case in CASES), _STEP]
    unknown = sorted(set(only or ()) - set(names))
    if unknown:
        raise RefusalError(f"bench: no {', '.join(unknown)}; there are {', '.join(names)}", status=2)
    no_gpu, run = why_no_gpu(), ops_run()
    if not tiny and (no_gpu or run.what != "kernels"):
        raise RefusalError(f"bench measures the kernels on a GPU: {no_gpu or run.because}", status=2)
    device, began = torch.device("cpu" if no_gpu else "cuda"), time.perf_counter()
    cases = [case for case in CASES if not only or case.op in only]
    ops = [_op(case, case.tiny if tiny else case.shapes[0], device, tiny) for case in cases]
    step = _step(device, tiny) if not only or _STEP in only else None
    more = [] if tiny else [(case, shape) for case in cases for shape in case.shapes[1:]]
    left_out = []
    for case, shape in more:
        if time.perf_counter() - began > seconds:
            left_out.append(f"{case.op} {_title(shape)}")
        else:
            ops.append(_op(case, shape, device, tiny))
    ops.sort(key=lambda op: names.index(op["op"]))
    data = {
        "device": "cpu" if no_gpu else torch.cuda.get_device_name(device),
        "versions": versions(),
        "tiny": tiny,
        "ops": ops,
        "step": step,
        "left_out": left_out,
        "seconds": time.perf_counter() - began,
    }
    measured = [step or {}, *(way for op in ops for way in op["ways"].values())]
    return Answer("bench", data, _page(data), status=1 if any("failed" in record for record in measured) else 0)


def _title(shape: Sizes) -> str:
    return "×".join(map(str, shape))


def _op(case: OpCase, shape: Sizes, device: torch.device, tiny: bool) -> Record:
    sys.stderr.write(f"{case.op} {_title(shape)}\n")
    compiled = torch.compile(case.stock, dynamic=False, backend="eager" if tiny else "inductor")
    functions = {"eager": case.stock, "compile": compiled, "liger": case.liger}
    ways = {name: _attempt(function, case, shape, device, tiny) for name, function in functions.items()}
    return {"op": case.op, "shape": list(shape), "ways": ways, "speedup": _speedup(ways)}


def _attempt(function: Function, case: OpCase, shape: Sizes, device: torch.device, tiny: bool) -> Record:
    """What one way takes, or why it cannot be measured: a failure is a finding, and the others go on."""
    try:
        with device:
            inputs = case.inputs(*shape)
        return _measured(function, inputs, device, 0 if tiny else _SECONDS)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    except Exception as error:
        return _failed(error)
    finally:
        _forget(device)


def _failed(error: Exception) -> Record:
    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def _measured(function: Function, inputs: list[torch.Tensor], device: torch.device, seconds: float) -> Record:
    """Milliseconds and MiB of one forward and backward. Outputs and gradients count as memory, inputs do not."""
    leaves = [tensor for tensor in inputs if tensor.requires_grad]
    upstream = [torch.ones_like(output) for output in _outputs(function, inputs)]

    def both() -> None:
        torch.autograd.grad(_outputs(function, inputs), leaves, upstream)

    both()
    peak = _peak_mib(both, device) if device.type == "cuda" else None
    took = Timer("both()", globals={"both": both}).blocked_autorange(min_run_time=seconds)
    return {"ms": took.median * 1e3, "peak_mib": peak}


def _outputs(function: Function, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    outputs = function(*inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _peak_mib(call: Callable[[], None], device: torch.device) -> float:
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


def _forget(device: torch.device) -> None:
    """Leave no GPU memory behind in torch.compile's caches, in cycles, in the allocator's."""
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _step(device: torch.device, tiny: bool) -> Record:
    """A training step of the largest model that fits."""
    try:
        model_type = family()
    except LookupError as error:
        return {"skipped": str(error)}
    free = torch.cuda.mem_get_info(device)[0] / 2**30 if device.type == "cuda" else 0.0
    for setting in [TINY] if tiny else [setting for setting in SETTINGS if setting.gib <= free]:
        sys.stderr.write(f"a training step: {model_type}, {setting.title}, {setting.batch}×{setting.sequence}\n")
        try:
            step = training_step(model_type, setting, device)
        except torch.OutOfMemoryError:
            continue
        except Exception as error:
            return _failed(error)
        finally:
            _forget(device)
        return {**step, "speedup": _speedup(step["ways"])}
    return {"skipped": f"{free:.1f} GiB of GPU memory are free, which is too little for the smallest model"}


def _speedup(ways: dict[str, Record]) -> float | None:
    eager, liger = (ways[name].get("ms") for name in ("eager", "liger"))
    return eager / liger if eager and liger else None


def _page(data: Record) -> list[str | Table]:
    page: list[str | Table] = [", ".join([data["device"], *(f"{n} {v}" for n, v in data["versions"].items() if v)])]
    if data["tiny"]:
        page.append("Tiny sizes: the figures say that it runs, and nothing else.")
    if data["ops"]:
        columns = ("eager", "compile", "liger", "times eager")
        rows = [
            (
                op["op"], _title(op["shape"]), *(_figures(op["ways"][name]) for name in columns[:3]),
                _times(op["speedup"]),
            )
            for op in data["ops"]
        ]  # fmt: skip
        page += [
            "Forward and backward in bf16, ms / peak MiB:",
            Table(("op", "shape", *columns), rows, numbers=frozenset(columns)),
        ]
        page += [
            f"{op['op']} {name} failed: {way['failed']}"
            for op in data["ops"]
            for name, way in op["ways"].items()
            if "failed" in way
        ]
    if data["step"]:
        page += _step_page(data["step"])
    if data["left_out"]:
        page.append(f"Left out for want of time: {', '.join(data['left_out'])}.")
    return [*page, f"{data['seconds']:.0f} s"]


def _figures(way: Record) -> str:
    if "ms" not in way:
        return "out of memory" if "out_of_memory" in way else "failed"
    return f"{way['ms']:.3f} / " + ("–" if way["peak_mib"] is None else f"{way['peak_mib']:,.0f}")


def _times(speedup: float | None) -> str:
    return "–" if speedup is None else f"{speedup:.2f}"


def _step_page(step: Record) -> list[str | Table]:
    if "ways" not in step:
        return [f"No training step: {step.get('skipped') or step['failed']}"]
    columns = ("ms", "tokens/s", "peak GiB")
    rows = [
        (
            name, f"{way['ms']:.1f}", f"{way['tokens_per_second']:,.0f}",
            "–" if way["peak_gib"] is None else f"{way['peak_gib']:.1f}",
        )
        for name, way in step["ways"].items()
    ]  # fmt: skip
    shape = f"{step['parameters'] / 1e6:,.0f}M parameters, {step['batch']}×{step['sequence']} tokens"
    return [
        f"A training step of a {step['model_type']} model in bf16 with AdamW, {shape}:",
        Table(("way", *columns), rows, numbers=frozenset(columns)),
        f"liger is {_times(step['speedup'])} times as fast.",
    ]
