"""transformers' Trainer and accelerate on a patched model: what they log, evaluate and gather is what stock gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import liger
from liger.lazy_logits import LazyLogits
from liger.ops import launch
from liger.testing import TINY
from liger.testing.plugin import HAS_GPU
from liger.testing.tiny import batch, build

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """What a Trainer asks of a model does not depend on the kernels; without a GPU they would only be slow."""
    monkeypatch.setattr(launch, "enabled", HAS_GPU)


@pytest.fixture
def reads(monkeypatch):
    """The list of times that logits were computed after a fused loss."""
    reads, own = [], LazyLogits.materialize

    def counting(self):
        if self._value is None:
            reads.append(1)
        return own(self)

    monkeypatch.setattr(LazyLogits, "materialize", counting)
    return reads


def stock_and_patched(device):
    stock = build(LlamaForCausalLM, LlamaConfig(**TINY, use_cache=False), device)
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


def trainer(model, tmp_path, *, metrics=None, preprocess=None, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=not HAS_GPU,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=1e-2,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=samples(),
        eval_dataset=samples(12),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
    )


def logged(model, tmp_path, **options):
    run = trainer(model, tmp_path, max_steps=4, **options)
    run.train()
    return torch.tensor([[entry["loss"], entry["grad_norm"]] for entry in run.state.log_history if "loss" in entry])


@pytest.mark.parametrize("adapter", [None, "lm_head"])
def test_eight_batches_of_one_train_as_one_batch_of_eight(device, tmp_path, adapter):
    """The ragged masks would weigh a batch's tokens by how few they are, if every batch divided by its own number."""
    peft = pytest.importorskip("peft")
    logs = []
    for rows, steps in ((8, 1), (1, 8)):
        for model in stock_and_patched(device):
            if adapter:
                config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", adapter])
                torch.manual_seed(3)
                model = peft.get_peft_model(model, config)
            logs.append(logged(model, tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=steps))
    assert logs[0].shape == (4, 2)
    for log in logs[1:]:
        torch.testing.assert_close(log, logs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_options_of_the_trainer_that_concern_the_loss(device, tmp_path, reads, options):
    stock, patched = (logged(model, tmp_path, **options) for model in stock_and_patched(device))
    tolerance = 2e-2 if "bf16" in options else 1e-4
    torch.testing.assert_close(patched, stock, rtol=tolerance, atol=tolerance)
    assert not reads


def accuracy(prediction):
    predicted = prediction.predictions
    if predicted.ndim == 3:
        predicted = predicted.argmax(-1)
    wanted = prediction.label_ids[:, 1:]
    return {"accuracy": float((predicted[:, :-1] == wanted)[wanted != -100].mean())}


def best(logits, labels):
    return logits.argmax(-1)


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("asked", "batches_read"),
    [
        ({}, 0),
        ({"prediction_loss_only": True, "metrics": accuracy}, 0),
        ({"metrics": accuracy}, 3),
        ({"metrics": accuracy, "preprocess": best}, 3),
        ({"metrics": accuracy, "preprocess": best, "eval_accumulation_steps": 1}, 3),
    ],
    ids=["no metrics", "loss only", "metrics", "preprocessed", "accumulated"],
)
def test_evaluate(device, tmp_path, reads, asked, batches_read, precision):
    """The logits are computed for whoever wants a metric of them, and for nobody else."""
    stock, patched = (
        trainer(model, tmp_path, per_device_eval_batch_size=4, **asked, **precision).evaluate()
        for model in stock_and_patched(device)
    )
    assert patched.keys() == stock.keys()
    assert ("eval_accuracy" in stock) == (batches_read > 0)
    rtol = 1e-2 if precision else 1e-5
    assert patched["eval_loss"] == pytest.approx(stock["eval_loss"], rel=rtol)
    assert patched.get("eval_accuracy") == pytest.approx(stock.get("eval_accuracy"), abs=0.05 if precision else 0)
    assert len(reads) == batches_read


def test_predict_returns_the_logits(device, tmp_path):
    stock, patched = (
        trainer(model, tmp_path, per_device_eval_batch_size=4).predict(samples(6))
        for model in stock_and_patched(device)
    )
    torch.testing.assert_close(torch.tensor(patched.predictions), torch.tensor(stock.predictions))


@pytest.fixture
def fresh_accelerate():
    """Accelerate holds one state for the process, and refuses another precision."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_gathers_pads_and_converts_outputs(device, fresh_accelerate, reads):
    stock, patched = stock_and_patched(device)
    inputs = batch(TINY["vocab_size"], device)
    head_calls = []
    patched.lm_head.register_forward_pre_hook(lambda *_: head_calls.append(1))
    accelerator = accelerate.Accelerator(cpu=not HAS_GPU, mixed_precision="bf16")
    prepared = accelerator.prepare(patched)  # its forward converts every output to fp32
    outputs = prepared(**inputs)
    assert outputs.logits.dtype == torch.float32
    moved = accelerate.utils.send_to_device(outputs, device)
    assert not reads
    expected = accelerator.prepare(stock)(**inputs).logits
    for got in (
        accelerator.gather_for_metrics(moved.logits),
        accelerator.pad_across_processes(moved.logits, dim=1, pad_index=-100),
        accelerator.gather_for_metrics({"logits": outputs.logits, "labels": inputs["labels"]})["logits"],
        accelerate.utils.convert_to_fp32(outputs).logits,
    ):
        torch.testing.assert_close(got + 0, expected, rtol=2e-2, atol=5e-2)
    assert len(head_calls) == 2  # for the loss, and once for all who read the logits


@pytest.fixture
def one_process(tmp_path):
    backend = "nccl" if HAS_GPU else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}, {}], ids=str)
def test_data_parallel_walks_over_outputs_without_reading_them(device, one_process, reads, options):
    stock, patched = stock_and_patched(device)
    inputs = batch(TINY["vocab_size"], device)
    parallel = nn.parallel.DistributedDataParallel(patched, **options)
    for _ in range(2):
        for model in (stock, parallel):
            outputs = model(**inputs)
            outputs.loss.backward()
        assert not reads
    torch.testing.assert_close(outputs.logits + 0, stock(**inputs).logits)
    for (name, theirs), ours in zip(stock.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
