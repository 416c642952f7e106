"""LoRA with PEFT: train the adapter, save it, merge it into the model, save that, and load both again.

    python examples/lora.py --model meta-llama/Llama-3.2-1B

`liger.apply` may come before `get_peft_model` or after it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

import liger
from python_help import PackedText, Row


def load(folder: str | Path) -> Any:
    """The model, patched."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    liger.apply(model)
    return model


def loss_of(model: Any, rows: list[Row]) -> float:
    """Of a few rows, in evaluation."""
    batch = default_data_collator(rows)
    with torch.no_grad():
        return float(model.eval()(**{name: value.to(model.device) for name, value in batch.items()}).loss)


def main() -> None:
    """Train, save, merge and load."""
    parser = argparse.ArgumentParser(description="LoRA with PEFT and Liger.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", type=Path, default=Path("lora-output"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch, for each device")
    parser.add_argument("--length", type=int, default=2048, help="of a row, in tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=32, target_modules="all-linear")
    model = get_peft_model(model, adapter)
    model.print_trainable_parameters()
    print(liger.apply(model))  # what was swapped, and what was declined and why

    rows = PackedText(tokenizer, options.length)
    two = [rows[0], rows[1]]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(options.output),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=options.learning_rate,
            bf16=torch.cuda.is_available(),
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
    )
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {logged[0]:.4f} -> {logged[-1]:.4f}")

    trained = loss_of(model, two)
    model.save_pretrained(options.output / "adapter")
    model.merge_and_unload().save_pretrained(options.output / "merged")
    tokenizer.save_pretrained(options.output / "merged")

    with_adapter = PeftModel.from_pretrained(load(options.model), options.output / "adapter")
    merged = load(options.output / "merged")
    print(
        f"loss of two rows: {trained:.4f} when trained, {loss_of(with_adapter, two):.4f} with the adapter loaded, "
        f"{loss_of(merged, two):.4f} merged and loaded"
    )


if __name__ == "__main__":
    main()
