"""transformers' Trainer and accelerate on a patched model: what they log, evaluate and gather is what stock gives."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from torch import nn
from transformers import DataCollatorWithFlattening

import liger
from liger import loss_request
from liger.lazy_logits import LazyLogits
from liger.testing import TINY
from liger.testing.parity import MODEL_DEPTH, assert_each_as_exact_as
from liger.testing.plugin import HAS_GPU
from liger.testing.tiny import batch
from tiny_trainer import logged, losses_and_norms, samples, stock_and_patched, tiny_llama, trainer

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("no_interpreter")


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


@pytest.fixture
def fresh_accelerate():
    """Accelerate holds one state for the process, and refuses another precision."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


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


CHECKPOINTED = {"gradient_checkpointing": True}


@pytest.mark.filterwarnings("error:liger")  # which says where the fused loss does not run
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"neftune_noise_alpha": 5.0},
        CHECKPOINTED,
        {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {**CHECKPOINTED, "bf16": True, "gradient_accumulation_steps": 2},
        {"bf16": True},
        {"include_num_input_tokens_seen": "all", "train_sampling_strategy": "group_by_length"},
        {"collator": DataCollatorWithFlattening(return_flash_attn_kwargs=True)},
        pytest.param({"fp16": True}, marks=pytest.mark.gpu),  # accelerate has no fp16 on the CPU
    ],
    ids=str,
)
def test_options_of_the_trainer(device, tmp_path, reads, fresh_accelerate, options):
    stock, patched = (logged(model, tmp_path, **options) for model in stock_and_patched(device))
    tolerance = 2e-2 if {"bf16", "fp16"} & options.keys() else 1e-4
    torch.testing.assert_close(patched, stock, rtol=tolerance, atol=tolerance)
    assert not reads


def test_a_batch_that_runs_out_of_memory_is_made_smaller(device, tmp_path, reads, fresh_accelerate):
    """By `auto_find_batch_size`, which begins anew with the model that the failed forward has left."""
    runs = []
    for model in stock_and_patched(device):

        def has_no_room(_, inputs):
            if len(inputs[0]) > 4:
                raise RuntimeError("CUDA out of memory.")

        model.model.norm.register_forward_pre_hook(has_no_room)
        runs.append(trainer(model, tmp_path, max_steps=3, per_device_train_batch_size=8, auto_find_batch_size=True))
        runs[-1].train()
    assert runs[1].state.train_batch_size == runs[0].state.train_batch_size <= 4
    torch.testing.assert_close(losses_and_norms(runs[1]), losses_and_norms(runs[0]), rtol=1e-4, atol=1e-4)
    assert not reads


def test_autocast_in_fp16(device):
    """On the CPU too, where the Trainer has no fp16: against the stock model's error of an fp32 step."""
    stock, patched = stock_and_patched(device)
    inputs = batch(TINY["vocab_size"], device)
    with torch.autocast(device.type, torch.float16):
        losses = [model(**inputs).loss for model in (patched, stock)]
    exact = copy.deepcopy(stock)
    for loss in (*losses, exact(**inputs).loss):
        loss.backward()
    assert losses[0].dtype == torch.float32
    named = zip(patched.named_parameters(), stock.parameters(), exact.parameters(), strict=True)
    gradients = {name: (ours.grad, theirs.grad, e.grad) for (name, ours), theirs, e in named}
    assert_each_as_exact_as(gradients, depth=MODEL_DEPTH, alone_from=None)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=pytest.mark.skipif(not HAS_GPU and not shutil.which("g++"), reason="inductor needs a C++ compiler"),
        ),
    ],
)
def test_a_compiled_trainer_trains_and_evaluates_as_an_eager_one(device, tmp_path, fresh_accelerate, backend):
    stock = tiny_llama(device, num_hidden_layers=1)
    patched = copy.deepcopy(stock)
    liger.apply(patched)
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    runs = [trainer(stock, tmp_path, max_steps=3), trainer(patched, tmp_path, max_steps=3, **compiled)]
    for run in runs:
        run.train()
    assert isinstance(runs[1].model_wrapped, torch._dynamo.OptimizedModule)
    torch.testing.assert_close(losses_and_norms(runs[1]), losses_and_norms(runs[0]), rtol=1e-4, atol=1e-4)
    if backend != "inductor" or HAS_GPU:  # its C++ compiler takes as long again for the evaluation's graph
        theirs, ours = (run.evaluate()["eval_loss"] for run in runs)
        assert ours == pytest.approx(theirs, rel=1e-4)


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


def test_accelerate_gathers_pads_and_converts_outputs(device, fresh_accelerate, reads, monkeypatch):
    stock, patched = stock_and_patched(device)
    inputs = batch(TINY["vocab_size"], device)
    computed, call_again = [], loss_request.call_again
    monkeypatch.setattr(loss_request, "call_again", lambda *args: computed.append(1) or call_again(*args))
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
    assert len(computed) == 1  # for all who read the logits


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
