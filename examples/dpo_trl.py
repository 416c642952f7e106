"""DPO with TRL's DPOTrainer, on a patched model.

    python examples/dpo_trl.py --model Qwen/Qwen3-0.6B

TRL computes its loss with a fused head of its own, and ours steps aside: norms, MLPs and rotary embeddings run on the
kernels. So it is in TRL's other trainers (SFT, KTO, GRPO, RLOO, Reward): `liger.apply` before the trainer, or on its
`model` after. Leave TRL's `use_liger_kernel` off, which is another library.
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import liger
from python_help import preferences


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description="DPO with TRL and Liger.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", default="dpo-output")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="pairs in a batch, for each device")
    parser.add_argument("--length", type=int, default=1024, help="of the longest row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(liger.apply(model))  # what was swapped, and what was declined and why
    liger.apply(reference)

    trainer = DPOTrainer(
        model,
        reference,
        args=DPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            max_length=options.length,
            learning_rate=options.learning_rate,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, options.steps // 20),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(preferences()),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = logged[0], logged[-1]
    print(
        f"loss {first['loss']:.4f} -> {last['loss']:.4f}, "
        f"margin {first['rewards/margins']:.4f} -> {last['rewards/margins']:.4f}"
    )


if __name__ == "__main__":
    main()
