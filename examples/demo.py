"""Train the same LLaMA twice, as transformers runs it and after `liger.apply`, and put the two runs side by side.

    python examples/demo.py                    (or `hatch run demo`, which makes the environment first)

The text is Python's own: the language reference in `pydoc_data.topics` and the sources of the standard library. A
token is one of the commonest words of that text, or else a single byte, so that any text can be encoded. Bytes alone
would be 256 tokens, and then there is no memory in the loss to save: the words make the vocabulary large.

Both runs start from the same weights and see the same batches in the same order. Written to `demo-output/`: the curves
and the memory of one step, as `demo.png`, and every figure, as `demo.json`.

How memory is measured. One step, which is not timed, runs under torch.profiler, whose memory events are all the
allocations and releases of torch's own allocator, also those inside an operation. Their running sum, on top of the
bytes of the weights and the optimizer's state, is the profile, and its maximum the peak; on a GPU the peak is
`torch.cuda.max_memory_allocated` over the timed steps. The process's resident memory would say less: it holds the
interpreter and whatever the C library has not given back. Scratch memory inside oneDNN or cuBLAS is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import liger
from demo_report import draw, table
from demo_text import Tokenizer, batches, text
from liger.ops.launch import runs_kernels

WARM_UP = 3
"""Steps that are trained like any other but not timed: kernels are compiled, memory is found."""


@dataclass(frozen=True)
class Setting:
    """A model and how it is trained."""

    name: str
    model: dict[str, Any]
    batch: int
    sequence: int
    steps: int
    learning_rate: float
    dtype: torch.dtype


SMALL = Setting(
    "a small LLaMA: 4 layers, hidden size 256, 8 heads of which 4 for keys and values, a vocabulary of 8,192",
    {
        "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
    },
    batch=8, sequence=256, steps=50, learning_rate=2e-3, dtype=torch.float32,
)  # fmt: skip

LLAMA_1B = Setting(
    "the shape of Llama 3.2 1B: 16 layers, hidden size 2048, 32 heads of which 8 for keys and values,"
    " a vocabulary of 128,256",
    {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    batch=4, sequence=4096, steps=30, learning_rate=2e-4, dtype=torch.bfloat16,
)  # fmt: skip


@dataclass
class Run:
    """What one training run showed."""

    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    baseline_bytes: int = 0
    profile: list[tuple[float, int]] = field(default_factory=list)
    """Of one step: milliseconds since it began, bytes that are allocated."""


def progress(title: str, step: int, steps: int, loss: float | None) -> None:
    """A progress bar on a terminal; a line every tenth of the way elsewhere."""
    filled = 30 * step // steps
    shown = "" if loss is None else f"  loss {loss:.3f}"
    line = f"{title:<8} [{'#' * filled}{'.' * (30 - filled)}] {step}/{steps}{shown}"
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if step == steps else "", flush=True)
    elif step % max(1, steps // 10) == 0 or step == steps:
        print(line, flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def storage_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the tensors' memory, tied ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def memory_of(step: Callable[[], object], baseline: int, device: torch.device, folder: Path) -> list[tuple[float, int]]:
    """What is allocated in the course of `step`, on top of `baseline` bytes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler announces itself on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
        synchronize(device)
    trace = folder / "memory-trace.json"
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    trace.unlink()
    kind = 1 if device.type == "cuda" else 0  # c10::DeviceType
    events = sorted((e for e in events if e["args"]["Device Type"] == kind), key=lambda e: e["ts"])
    points = [(0.0, baseline)]
    for event in events:
        points.append(((event["ts"] - events[0]["ts"]) / 1e3, points[-1][1] + event["args"]["Bytes"]))
    return points


def train(setting: Setting, patched: bool, data: list[Tensor], device: torch.device, folder: Path) -> Run:
    """Train from the same seed, as transformers does it or patched."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**setting.model, use_cache=False)).to(device, setting.dtype).train()
    title = "patched" if patched else "stock"
    if patched:
        print(f"\n{liger.apply(model)}\n")
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, fused=True)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    run = Run()
    losses: list[Tensor] = []
    began = 0.0
    for i, batch in enumerate(data):
        if i == WARM_UP:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
        losses.append(step(batch))
        # Reading the loss waits for the device. The one before is there already, and the next step is on its way.
        progress(title, i + 1, len(data), float(losses[-2]) if i else None)
    synchronize(device)
    run.tokens_per_second = (len(data) - WARM_UP) * data[0].numel() / (time.perf_counter() - began)
    run.losses = [float(loss) for loss in losses]
    if device.type == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()

    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    run.baseline_bytes = storage_bytes([*model.parameters(), *model.buffers(), *state])
    if device.type == "cuda":
        run.baseline_bytes = torch.cuda.memory_allocated()
    run.profile = memory_of(lambda: step(data[0]), run.baseline_bytes, device, folder)
    run.peak_bytes = run.peak_bytes or max(bytes_ for _, bytes_ in run.profile)
    return run


def what_ran(device: torch.device) -> str:
    """Which code the patched run went through here, and what follows for the figures."""
    if runs_kernels(torch.empty(1, device=device)):
        return f"The patched run used the Triton kernels on {torch.cuda.get_device_name()}."
    return (
        "The patched run used liger's torch references on the CPU: the loss is computed in chunks, the rest as stock\n"
        "does it. No Triton kernel ran. What this can show: the same training, in less memory. What it cannot show:\n"
        "speed. The tokens per second are this machine's, and say nothing about a GPU."
    )


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Train a LLaMA as transformers runs it, then after liger.apply.")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for demo.png and demo.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    setting = LLAMA_1B if device.type == "cuda" else SMALL
    steps = max(options.steps or setting.steps, WARM_UP + 1)
    options.output.mkdir(parents=True, exist_ok=True)

    source = text()
    tokenizer = Tokenizer(source, setting.model["vocab_size"])
    data = batches(tokenizer.encode(source), steps, setting.batch, setting.sequence, device)
    print(
        f"{setting.name}\n{steps} steps of {setting.batch} x {setting.sequence} tokens, {setting.dtype}, on {device}\n"
    )

    runs = {}
    for name in ("stock", "patched"):
        runs[name] = train(setting, name == "patched", data, device, options.output)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report = {name: asdict(run) for name, run in runs.items()}
    print(f"\n{table(report)}\n\n{what_ran(device)}\n")
    (options.output / "demo.json").write_text(
        json.dumps({"setting": setting.name, "torch": torch.__version__, **report})
    )
    picture = draw(report, options.output / "demo.png")
    print(
        f"written: {options.output / 'demo.json'}" + (f", {picture}" if picture else "; no picture without matplotlib")
    )


if __name__ == "__main__":
    main()
