"""FSDP2: torch's `fully_shard` over any number of GPUs, in a loop of one's own.

    torchrun --nproc-per-node 8 examples/fsdp2.py --model meta-llama/Llama-3.1-8B

`liger.apply` comes before the sharding here; after it works too. Without GPUs the processes talk through gloo.
"""

from __future__ import annotations

import argparse
import os
from itertools import chain, islice, repeat

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import liger
from python_help import PackedText


def main() -> None:
    """Train, and save the whole model."""
    parser = argparse.ArgumentParser(description="FSDP2 with Liger, started by torchrun.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", default="fsdp2-output")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="rows in a batch, for each process")
    parser.add_argument("--length", type=int, default=4096, help="of a row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))
    rank = dist.get_rank()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    patch = liger.apply(model)
    if rank == 0:
        print(patch)  # what was swapped, and what was declined and why
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    model.to(device).train()

    rows = PackedText(tokenizer, options.length)
    loader = DataLoader(rows, options.batch, sampler=DistributedSampler(rows), collate_fn=default_data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, fused=True)
    every = max(1, options.steps // 20)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), start=1):
        loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 or step == 1:
            mean = loss.detach() / mesh.size()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean:.4f}", flush=True)

    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(options.output, state_dict=whole)
        tokenizer.save_pretrained(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
