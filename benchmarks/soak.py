"""Thousands of steps of a patched model over random shapes, in one process: what grows, what is compiled anew, NaN.

    python -m benchmarks.soak --json benchmarks/results/h100-soak.json

A small Llama in bf16 takes steps whose batch size, sequence length and ignored labels are drawn anew each time. After
every `EVERY` steps it is evaluated, generates, and the process is looked at. The exit status is 1 when something is
wrong.

cuDNN's attention, which torch prefers on such GPUs, keeps a plan for every shape it has seen: the process would grow
without us too. Here torch takes its other flash attention.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.results_file import device_name, versions, write

Mark = dict[str, Any]

STEPS, EVERY = 3000, 100
LONGEST, LARGEST = 1024, 8
"""Tokens of a sequence and sequences of a batch, at most."""
_SMALL = {
    "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 2048,
}  # fmt: skip
_TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip

SLACK_MIB = {"allocated_mib": 1.0, "reserved_mib": 256.0, "resident_mib": 64.0}
"""How much more the second half may have than the first. The allocator keeps, and the C library too, what a rare
shape took; what a step leaks is there a thousand times."""


def compiled_variants() -> int:
    """How many variants Triton has compiled of the kernels of `liger.ops`."""
    return sum(
        len(caches[0])
        for name, module in list(sys.modules.items())
        if name.startswith("liger.ops.")
        for value in vars(module).values()
        for caches in getattr(value, "device_caches", {}).values()
    )


def _resident_mib() -> float | None:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20 if statm.exists() else None


def _mark(step: int, losses: list[Tensor], others: list[Tensor], device: torch.device) -> Mark:
    gc.collect()
    on_gpu = device.type == "cuda"
    return {
        "step": step,
        "loss": round(torch.stack(losses).mean().item(), 4),
        "finite": bool(torch.stack([*losses, *others]).isfinite().all()),
        "allocated_mib": torch.cuda.memory_allocated() / 2**20 if on_gpu else None,
        "reserved_mib": torch.cuda.memory_reserved() / 2**20 if on_gpu else None,
        "resident_mib": _resident_mib(),
        "variants": compiled_variants(),
    }


def _built(device: torch.device, tiny: bool, patched: bool, attention: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    import liger

    torch.manual_seed(0)
    config = LlamaConfig(**(_TINY if tiny else _SMALL), tie_word_embeddings=True)
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.bfloat16()
    if patched:
        liger.apply(model)
    return model


def soak(
    device: torch.device,
    steps: int,
    every: int,
    tiny: bool = False,
    save: Callable[[list[Mark]], None] = lambda marks: None,
    patched: bool = True,
    attention: str = "sdpa",
) -> list[Mark]:
    """Take the steps. Returns what was seen after each `every` of them."""
    model = _built(device, tiny, patched, attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    longest, largest = (24, 3) if tiny else (LONGEST, LARGEST)
    vocabulary, chance = model.config.vocab_size, random.Random(0)
    marks: list[Mark] = []
    losses: list[Tensor] = []
    others: list[Tensor] = []
    for step in range(1, steps + 1):
        # The largest shape comes first, so that what it takes is there from the beginning.
        shape = (largest, longest) if step == 1 else (chance.randint(1, largest), chance.randint(2, longest))
        tokens = torch.randint(vocabulary, shape, device=device)
        labels = tokens.masked_fill(torch.rand(shape, device=device) < 0.3 * chance.random(), -100)
        labels[0, -1] = tokens[0, -1]  # the mean of no loss at all is NaN
        model.train()
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        others.append(norm)
        if step % every:
            continue
        model.eval()
        with torch.no_grad():
            evaluated = model(input_ids=tokens, labels=tokens)
            others += [evaluated.loss, evaluated.logits.float().mean()]
        model.generate(tokens[:, :16], attention_mask=torch.ones_like(tokens[:, :16]), max_new_tokens=8)
        del evaluated, loss, norm, tokens, labels
        marks.append(_mark(step, losses, others, device))
        losses.clear()
        others.clear()
        save(marks)
    return marks


def complaints(marks: list[Mark], steps: int) -> list[str]:
    """What is wrong: not all `steps`, NaN, more memory in the second half than in the first, kernels compiled since."""
    if len(marks) < 4:
        return [f"{len(marks)} marks are too few to say anything"]
    found = [] if marks[-1]["step"] == steps else [f"it ended after {marks[-1]['step']} of {steps} steps"]
    found += [
        f"step {mark['step']}: a loss, a gradient or logits are not finite" for mark in marks if not mark["finite"]
    ]
    half = len(marks) // 2
    for key, slack in SLACK_MIB.items():
        if marks[0][key] is not None:
            before, after = (max(mark[key] for mark in part) for part in (marks[:half], marks[half:]))
            if after > before + slack:
                found.append(f"{key}: {before:.1f} in the first half, {after:.1f} in the second")
    if marks[-1]["variants"] != marks[0]["variants"]:
        found.append(f"variants: {marks[0]['variants']} after the first mark, {marks[-1]['variants']} at the end")
    return found


def main() -> None:
    """Soak, and say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--every", type=int, default=EVERY, help="steps between two looks")
    parser.add_argument("--json", type=Path, help="write what was seen to this file, after each look")
    parser.add_argument("--stock", action="store_true", help="without liger.apply: what grows there is not ours")
    parser.add_argument("--attention", default="sdpa", help="transformers' attn_implementation")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the program runs, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began, device = time.monotonic(), torch.device(options.device)
    results = {"device": device_name(device), "versions": versions()}
    torch.backends.cuda.enable_cudnn_sdp(False)

    def save(marks: list[Mark]) -> None:
        print(f"{time.monotonic() - began:4.0f} s  {marks[-1]}", flush=True)
        if options.json:
            write(options.json, {**results, "soak": {"marks": marks, "complaints": complaints(marks, options.steps)}})

    marks = soak(device, options.steps, options.every, options.tiny, save, not options.stock, options.attention)
    wrong = complaints(marks, options.steps)
    print(*(wrong or [f"nothing is wrong after {options.steps} steps"]), sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
