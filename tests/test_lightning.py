"""Lightning's Trainer on a patched model: each step's loss, the gradients and the checkpoints are those of stock."""

from __future__ import annotations

import copy

import pytest
import torch

import liger
from liger.lazy_logits import LazyLogits
from liger.subclass import Swappable
from liger.testing.plugin import HAS_GPU
from tiny_trainer import samples, stock_and_patched, tiny_llama

lightning = pytest.importorskip("pytorch_lightning")
pytestmark = [pytest.mark.usefixtures("no_interpreter"), pytest.mark.filterwarnings("ignore:::pytorch_lightning")]


class Module(lightning.LightningModule):
    """Whose training step returns the model's whole output, as a dict: Lightning detaches and keeps what is in it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.losses, self.accuracies = [], []

    def training_step(self, batch):
        outputs = self.model(**batch)
        self.log("loss", outputs.loss)
        self.losses.append(outputs.loss.detach())
        return dict(outputs)

    def validation_step(self, batch):
        outputs = self.model(**batch)
        wanted = batch["labels"][:, 1:]
        right = outputs.logits[:, :-1].argmax(-1) == wanted
        self.accuracies.append(right[wanted != -100].float().mean())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def steps(self):
        return torch.stack(self.losses).cpu()


class LazyStill(lightning.Callback):
    """Counts the batches after which nobody had read the logits."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.batches += isinstance(outputs["logits"], LazyLogits) and outputs["logits"]._value is None


def loaders(rows=4):
    return {
        "train_dataloaders": torch.utils.data.DataLoader(samples(), batch_size=rows),
        "val_dataloaders": torch.utils.data.DataLoader(samples(8), batch_size=rows),
    }


def fit(module, tmp_path, steps=5, ckpt_path=None, **options):
    own = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "num_sanity_val_steps": 0}
    own |= {"accelerator": "gpu" if HAS_GPU else "cpu", "devices": 1, "enable_checkpointing": False}
    trainer = lightning.Trainer(max_steps=steps, default_root_dir=tmp_path, **{**own, **options})
    trainer.fit(module, ckpt_path=ckpt_path, **loaders())
    return trainer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2, "max_epochs": 2, "steps": 6},
        {"gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        pytest.param({"precision": "16-mixed"}, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_five_steps(device, tmp_path, options):
    modules = [Module(model) for model in stock_and_patched(device)]
    seen = LazyStill()
    for module in modules:
        fit(module, tmp_path, callbacks=[seen] if module is modules[1] else [], **options)
    stock, patched = modules
    assert len(stock.losses) >= 5
    assert seen.batches == len(stock.losses)
    tolerance = 2e-2 if "precision" in options else 1e-4
    torch.testing.assert_close(patched.steps(), stock.steps(), rtol=tolerance, atol=tolerance)
    if not options:
        torch.testing.assert_close(patched.model.state_dict(), stock.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_validation_reads_the_logits(device, tmp_path):
    modules = [Module(model) for model in stock_and_patched(device)]
    for module in modules:
        fit(module, tmp_path, steps=2, val_check_interval=1)
    assert len(modules[0].accuracies) == 4
    torch.testing.assert_close(torch.stack(modules[1].accuracies), torch.stack(modules[0].accuracies))


def test_checkpoints_pass_between_stock_and_patched_models(device, tmp_path):
    stock, patched = stock_and_patched(device)
    resumed = []
    for first, then in ((stock, stock), (patched, stock), (stock, patched)):
        fit(Module(copy.deepcopy(first)), tmp_path, steps=2).save_checkpoint(tmp_path / "two.ckpt")
        rest = Module(copy.deepcopy(then))
        fit(rest, tmp_path, ckpt_path=tmp_path / "two.ckpt")
        resumed.append(rest.steps())
    assert resumed[0].shape == (3,)
    for steps in resumed[1:]:
        torch.testing.assert_close(steps, resumed[0], rtol=1e-4, atol=1e-4)


def test_a_model_that_is_made_and_patched_in_configure_model(device, tmp_path):
    class Late(Module):
        def __init__(self):
            super().__init__(None)

        def configure_model(self):
            if self.model is None:
                self.model = tiny_llama(self.device)
                liger.apply(self.model)

    late, stock = Late(), Module(tiny_llama(device))
    for module in (late, stock):
        fit(module, tmp_path)
    assert isinstance(late.model, Swappable)
    torch.testing.assert_close(late.steps(), stock.steps(), rtol=1e-4, atol=1e-4)


def test_the_module_around_the_model_can_be_given_to_apply(device, tmp_path):
    stock, model = tiny_llama(device), tiny_llama(device)
    modules = [Module(stock), Module(model)]
    patch = liger.apply(modules[1])
    assert all(swapped.name.startswith("model") for swapped in patch.swapped)
    for module in modules:
        fit(module, tmp_path)
    torch.testing.assert_close(modules[1].steps(), modules[0].steps(), rtol=1e-4, atol=1e-4)
