"""What transformers' Trainer writes and builds itself: checkpoints, saved models, and models from `model_init`."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import liger
from liger.subclass import Swappable
from liger.testing import TINY
from liger.testing.tiny import batch
from tiny_trainer import losses_and_norms, stock_and_patched, tiny_llama, trainer

pytestmark = pytest.mark.usefixtures("no_interpreter")


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "then"), [("patched", "patched"), ("patched", "stock"), ("stock", "patched")])
def test_a_run_is_resumed_from_a_checkpoint(device, tmp_path, first, then):
    """Whoever wrote it and whoever goes on, the steps are those of an uninterrupted stock run."""
    models = dict(zip(("stock", "patched"), stock_and_patched(device), strict=True))
    whole = trainer(copy.deepcopy(models["stock"]), tmp_path / "whole", max_steps=4)
    whole.train()
    interrupted = trainer(
        copy.deepcopy(models[first]), tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2
    )
    interrupted.train()
    resumed = trainer(models[then], tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_close(losses_and_norms(resumed), losses_and_norms(whole))


def test_the_best_checkpoint_is_loaded_into_a_patched_model(device, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    runs = [
        trainer(model, tmp_path / name, max_steps=3, load_best_model_at_end=True, **saving)
        for name, model in zip(("stock", "patched"), stock_and_patched(device), strict=True)
    ]
    for run in runs:
        run.train()
    stock, patched = runs
    assert Path(patched.state.best_model_checkpoint).name == Path(stock.state.best_model_checkpoint).name
    assert patched.evaluate()["eval_loss"] == pytest.approx(patched.state.best_metric)
    assert isinstance(patched.model, Swappable)


def test_a_saved_model_loads_as_the_stock_class_and_can_be_patched_again(device, tmp_path):
    stock, patched = stock_and_patched(device)
    for name, model in (("stock", stock), ("patched", patched)):
        trainer(model, tmp_path, max_steps=1).save_model(str(tmp_path / name))
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("patched", "stock"))
    assert ours == theirs
    inputs = batch(TINY["vocab_size"], device)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched").to(device)
    assert type(loaded) is type(stock)
    expected = stock(**inputs).loss
    torch.testing.assert_close(loaded(**inputs).loss, expected)
    assert liger.apply(loaded).swapped
    torch.testing.assert_close(loaded(**inputs).loss, expected, rtol=1e-5, atol=1e-5)


def test_model_init_patches_each_model_that_it_makes(device, tmp_path):
    made = []

    def model_init():
        model = tiny_llama(device)
        liger.apply(model)
        made.append(model)
        return model

    stock = trainer(None, tmp_path, model_init=lambda: tiny_llama(device), max_steps=3)
    patched = trainer(None, tmp_path, model_init=model_init, max_steps=3)
    for run in (stock, patched):
        run.train()
    assert patched.model is made[-1]
    assert all(isinstance(model, Swappable) for model in made)
    assert_close(losses_and_norms(patched), losses_and_norms(stock))
    patched.train()  # with a new model, which starts as the first did
    assert patched.model is made[-1]
    assert_close(losses_and_norms(patched)[-3:], losses_and_norms(stock))
