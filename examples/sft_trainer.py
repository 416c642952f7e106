"""Supervised fine-tuning with transformers' Trainer: questions with answers, of which only the answers count.

    python examples/sft_trainer.py --model meta-llama/Llama-3.2-1B

Only the line with `liger.apply` is new.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import liger
from python_help import questions_and_answers


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning with transformers' Trainer and Liger.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", default="sft-output")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch, for each device")
    parser.add_argument("--length", type=int, default=2048, help="the longest row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    print(liger.apply(model))  # what was swapped, and what was declined and why

    rows = questions_and_answers(tokenizer, options.length)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=2,
            learning_rate=options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=options.steps // 20,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, options.steps // 20),
            report_to="none",
        ),
        train_dataset=rows[8:],
        eval_dataset=rows[:8],
        data_collator=DataCollatorForSeq2Seq(tokenizer),  # pads the labels too
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {logged[0]:.4f} -> {logged[-1]:.4f}, of what was not trained on {before:.4f} -> {after:.4f}")


if __name__ == "__main__":
    main()
