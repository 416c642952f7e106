"""DeepSpeed ZeRO-3 over any number of GPUs, in a loop of one's own.

    torchrun --nproc-per-node 8 examples/zero3.py --model meta-llama/Llama-3.1-8B

The config comes before the model, so that `from_pretrained` loads each process's share of it and no more; `liger.apply`
patches the model as any other. With transformers' Trainer the same config is `TrainingArguments(deepspeed=…)`.
`--stage 2` is ZeRO-2. Without GPUs the processes talk through gloo.
"""

from __future__ import annotations

import argparse
from itertools import chain, islice, repeat

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator
from transformers.integrations import HfDeepSpeedConfig

import liger
from python_help import PackedText

ON_GPU = torch.cuda.is_available()
if not ON_GPU:  # or DeepSpeed builds an extension for processes on one CPU, where gloo will do
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def main() -> None:
    """Train, and save the whole model."""
    parser = argparse.ArgumentParser(description="DeepSpeed ZeRO with Liger, started by torchrun.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", default="zero-output")
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1, help="rows in a batch, for each process")
    parser.add_argument("--length", type=int, default=4096, help="of a row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()

    deepspeed.init_distributed("nccl" if ON_GPU else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": options.batch,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": ON_GPU},
        "zero_optimization": {"stage": options.stage, "stage3_gather_16bit_weights_on_model_save": True},
    }
    _alive_while_loading = HfDeepSpeedConfig(config)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16 if ON_GPU else torch.float32)
    patch = liger.apply(model)
    if rank == 0:
        print(patch)  # what was swapped, and what was declined and why
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    rows = PackedText(tokenizer, options.length)
    loader = DataLoader(rows, options.batch, sampler=DistributedSampler(rows), collate_fn=default_data_collator)
    every = max(1, options.steps // 20)
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.steps), start=1):
        loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        if step % every == 0 or step == 1:
            mean = loss.detach() / world
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step}: loss {mean:.4f}", flush=True)

    engine.save_16bit_model(options.output)
    if rank == 0:
        model.config.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
