"""Pretraining from random weights in a compiled loop: packed text, each layer compiled, fused AdamW.

    python examples/compiled_pretraining.py --model meta-llama/Llama-3.2-1B --batch 4

takes that model's config and tokenizer, not its weights. `liger.apply` comes before `compile`: the kernels are traced
with the rest of the layer. Layers, not the whole model, because they all share one compilation.
"""

from __future__ import annotations

import argparse
import time
from itertools import chain, islice, repeat

import torch
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, default_data_collator

import liger
from python_help import PackedText


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="Compiled pretraining with Liger.")
    parser.add_argument("--model", required=True, help="whose config and tokenizer: a folder, or a name on the Hub")
    parser.add_argument("--output", default="pretraining-output")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch")
    parser.add_argument("--length", type=int, default=4096, help="of a row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    config = AutoConfig.from_pretrained(options.model, use_cache=False)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    print(liger.apply(model))  # what was swapped, and what was declined and why
    for layer in model.model.layers:
        layer.compile(backend=options.backend, fullgraph=True)
    model.train()

    loader = DataLoader(
        PackedText(tokenizer, options.length),
        options.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=default_data_collator,
        pin_memory=on_gpu,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.95), fused=True)
    every, began = max(1, options.steps // 20), time.perf_counter()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), start=1):
        inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 or step == 1:
            value = loss.item()  # waits for the device
            seconds, began = time.perf_counter() - began, time.perf_counter()
            tokens = (every if step > 1 else 1) * options.batch * options.length
            print(f"step {step}: loss {value:.4f}, {tokens / seconds:,.0f} tokens/s", flush=True)
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
