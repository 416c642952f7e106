"""QLoRA, LoRA on 4-bit weights: trained as transformers runs it and after `liger.apply`, with losses, speed and memory.

    python examples/qlora.py --model meta-llama/Llama-3.1-8B

Then the adapter is merged into the unquantised model, saved and loaded. Needs bitsandbytes; a GPU to say anything about
speed and memory.
"""

from __future__ import annotations

import argparse
import gc
import time
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, default_data_collator

import liger
from python_help import PackedText

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
WARM_UP = 3
"""Steps that are trained but not timed."""


class Run(NamedTuple):
    """What one training run showed."""

    losses: list[float]
    tokens_per_second: float
    peak_gib: float | None


def quantised(path: str) -> Any:
    """The model in 4 bits, with LoRA on all its linear layers but the head."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": DEVICE}
    )
    torch.manual_seed(0)  # the adapter's first weights, the same in both runs
    adapter = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    return get_peft_model(model, adapter)


def train(options: argparse.Namespace, rows: PackedText, patched: bool) -> Run:
    """Train from the same weights on the same rows, as transformers does it or patched, and save the adapter."""
    model = quantised(options.model).train()
    if patched:
        print(liger.apply(model))  # what was swapped, and what was declined and why
    loader = DataLoader(rows, batch_size=options.batch, collate_fn=default_data_collator, drop_last=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.learning_rate)
    losses, began = [], 0.0
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), WARM_UP + options.steps)):
        if step == WARM_UP and DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        if step == WARM_UP:
            began = time.perf_counter()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = model(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    values = torch.stack(losses).tolist()  # waits for the device
    tokens = options.steps * options.batch * options.length
    model.save_pretrained(options.output / "adapter")
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None
    return Run(values, tokens / (time.perf_counter() - began), peak)


def merge(options: argparse.Namespace, rows: PackedText) -> None:
    """Merge the adapter into the model that is not quantised, save, load, and show the loss of both."""
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16, device_map={"": DEVICE})
    merged = PeftModel.from_pretrained(base, options.output / "adapter").merge_and_unload()
    merged.save_pretrained(options.output / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(options.output / "merged", device_map={"": DEVICE})
    batch = {name: value.to(DEVICE) for name, value in default_data_collator([rows[0]]).items()}
    with torch.no_grad():
        for name, model in (("merged", merged), ("merged, saved and loaded", loaded)):
            liger.apply(model)
            print(f"loss of a row, {name}: {model(**batch).loss:.4f}")


def main() -> None:
    """Train twice, show both runs, merge."""
    parser = argparse.ArgumentParser(description="QLoRA with and without Liger.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", type=Path, default=Path("qlora-output"))
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each run")
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    rows = PackedText(AutoTokenizer.from_pretrained(options.model), options.length)
    runs = {}
    for name in ("stock", "liger"):
        runs[name] = train(options, rows, patched=name == "liger")
        gc.collect()
        torch.cuda.empty_cache()
    for name, run in runs.items():
        memory = f", peak {run.peak_gib:.2f} GiB" if run.peak_gib else ""
        print(
            f"{name}: loss {run.losses[0]:.4f} -> {run.losses[-1]:.4f}, {run.tokens_per_second:,.0f} tokens/s{memory}"
        )
    apart = max(abs(a - b) for a, b in zip(runs["stock"].losses, runs["liger"].losses, strict=True))
    print(f"losses at most {apart:.4f} apart")
    merge(options, rows)


if __name__ == "__main__":
    main()
