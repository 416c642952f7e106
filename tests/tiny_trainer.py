"""A tiny LLaMA, stock and patched, rows to train it on, and what transformers' Trainer logs of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import LlamaConfig, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import liger
from liger.testing import TINY
from liger.testing.plugin import HAS_GPU
from liger.testing.tiny import build

OPTIONS: dict[str, Any] = {
    "use_cpu": not HAS_GPU,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "learning_rate": 1e-2,
    "dataloader_pin_memory": False,
}
"""What every TrainingArguments here has, TRL's too."""


def tiny_llama(device, **config):
    return build(LlamaForCausalLM, LlamaConfig(**{**TINY, "use_cache": False, **config}), device)


def stock_and_patched(device, **config):
    stock = tiny_llama(device, **config)
    patched = copy.deepcopy(stock)
    liger.apply(patched)
    return stock, patched


def samples(count=32, length=10):
    """Rows of one length of which the first, few or many, tokens have no label."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, TINY["vocab_size"], (count, length), generator=generator)
    masked = torch.randint(length, (count, 1), generator=generator)
    labels = ids.masked_fill(torch.arange(length) < masked, -100)
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def trainer(model, tmp_path, *, metrics=None, preprocess=None, model_init=None, collator=None, **options):
    arguments = TrainingArguments(output_dir=str(tmp_path), **{**OPTIONS, **options})
    return Trainer(
        model,
        arguments,
        train_dataset=samples(),
        eval_dataset=samples(12),
        model_init=model_init,
        data_collator=collator,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
    )


def losses_and_norms(run):
    """(steps, 2): the loss and the gradient's norm of each step that a trainer has logged."""
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in run.state.log_history if "loss" in entry])


def logged(model, tmp_path, *, steps=4, **options):
    run = trainer(model, tmp_path, max_steps=steps, **options)
    run.train()
    return losses_and_norms(run)
