"""Supervised fine-tuning with Lightning: the model is patched in the module's `configure_model`.

    python examples/lightning_module.py --model meta-llama/Llama-3.2-1B

In validation too the loss comes without logits; a metric that reads `outputs.logits` gets them.
"""

from __future__ import annotations

import argparse
from typing import Any

import pytorch_lightning as lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import liger
from python_help import Row, questions_and_answers


class FineTuning(lightning.LightningModule):
    """A language model that is trained on its own loss."""

    def __init__(self, name: str, learning_rate: float) -> None:
        super().__init__()
        self.name, self.learning_rate = name, learning_rate
        self.model: Any = None
        self.losses: list[Tensor] = []

    def configure_model(self) -> None:
        """Load the model and patch it; Lightning calls this more than once."""
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.name, dtype=torch.float32).train()
            self.print(liger.apply(self.model))  # what was swapped, and what was declined and why

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        """The loss of what is not trained on."""
        self.log("validation loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; not the fused one, whose gradients Lightning does not clip in mixed precision."""
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate)


def main() -> None:
    """Train, evaluate and save."""
    parser = argparse.ArgumentParser(description="Supervised fine-tuning with Lightning and Liger.")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--output", default="lightning-output")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch, for each device")
    parser.add_argument("--length", type=int, default=2048, help="the longest row, in tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    rows = questions_and_answers(tokenizer, options.length)
    collate = DataCollatorForSeq2Seq(tokenizer)  # pads the labels too
    training: DataLoader[Row] = DataLoader(rows[8:], options.batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    validation: DataLoader[Row] = DataLoader(rows[:8], options.batch, collate_fn=collate)  # type: ignore[arg-type]

    module = FineTuning(options.model, options.learning_rate)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        gradient_clip_val=1.0,
        default_root_dir=options.output,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, training)
    after = trainer.validate(module, validation, verbose=False)[0]["validation loss"]
    module.model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    losses = torch.stack(module.losses).tolist()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, of what was not trained on {after:.4f}")


if __name__ == "__main__":
    main()
