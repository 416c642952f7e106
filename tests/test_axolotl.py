"""The plugin for Axolotl, through Axolotl's own loader and command where it is installed: `hatch run axolotl:test`."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from liger.subclass import Swappable
from liger.testing import TINY
from liger.testing.plugin import HAS_GPU
from liger.testing.tiny import batch
from tiny_trainer import tiny_llama

EXAMPLE = Path(__file__).parent.parent / "examples" / "axolotl"
yaml = pytest.importorskip("yaml")
tokenizers = pytest.importorskip("tokenizers")
PLUGINS = yaml.safe_load((EXAMPLE / "config.yml").read_text())["plugins"]
pytestmark = pytest.mark.usefixtures("no_interpreter")


@pytest.fixture
def tiny_path(device, tmp_path):
    """A folder with a tiny model and its tokenizer."""
    tiny_llama(device).save_pretrained(tmp_path)
    words = {f"w{number}": number for number in range(TINY["vocab_size"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3"))
    special = {"pad_token": "w0", "bos_token": "w1", "eos_token": "w2", "unk_token": "w3"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def config(tiny_path, tmp_path):
    """Writes the example's config with those plugins, for the tiny model, and others of its options replaced."""
    for name in ("addict", "axolotl"):
        if importlib.util.find_spec(name) is None:
            pytest.skip("Axolotl is not installed")

    def write(plugins, **options):
        data = tmp_path / "rows.json"
        data.write_text(json.dumps({"text": "w5 w6 w7 w8 w9 " * 8}))
        config = yaml.safe_load((EXAMPLE / "config.yml").read_text())
        config |= {"base_model": str(tiny_path), "plugins": plugins, "output_dir": str(tmp_path / "output")}
        config |= {"datasets": [{"path": str(data), "ds_type": "json", "type": "completion"}], "bf16": HAS_GPU}
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump({**config, **options}))
        return path

    return write


@pytest.fixture
def loaded(config, monkeypatch):
    """Loads the model by such a config."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from axolotl.cli.config import load_cfg
    from axolotl.integrations.base import PluginManager
    from axolotl.loaders import ModelLoader, load_tokenizer

    def load(plugins, **options):
        PluginManager.get_instance().plugins.clear()
        cfg = load_cfg(str(config(plugins, **options)))
        torch.manual_seed(3)
        return ModelLoader(cfg, load_tokenizer(cfg)).load()[0]

    return load


def patched_classes(model):
    return {type(module).__name__ for module in model.modules() if isinstance(module, Swappable)}


LLAMA = {"LlamaForCausalLM", "Linear", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"}


STOOD_IN = {
    **{package: {} for package in ("axolotl", "axolotl.integrations", "axolotl.utils")},
    "axolotl.integrations.base": {"BasePlugin": object},
    "axolotl.utils.logging": {"get_logger": logging.getLogger},
}
"""What the plugin takes of Axolotl."""


def test_the_plugin_that_the_config_names_patches_a_model(device, monkeypatch):
    for name, members in STOOD_IN.items():
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[name]).update(members)
    monkeypatch.syspath_prepend(EXAMPLE)
    module, _, plugin = PLUGINS[0].rpartition(".")
    model = tiny_llama(device)
    getattr(importlib.import_module(module), plugin)().post_model_load({}, model)
    sys.modules.pop(module)  # or it is this one in Axolotl too
    assert patched_classes(model) == LLAMA


FULL = {"adapter": None, "lora_r": None}
OWN_KERNELS = {"lora_mlp_kernel": False, "lora_qkv_kernel": False, "lora_o_kernel": False}
"""Axolotl's own, which it puts on by itself, and for the whole process."""


@pytest.mark.parametrize("options", [OWN_KERNELS, FULL], ids=["LoRA", "full"])
def test_the_loader_calls_the_plugin(device, loaded, options):
    stock, patched = loaded([], **options).to(device), loaded(PLUGINS, **options).to(device)
    assert (patched_classes(stock), patched_classes(patched)) == (set(), LLAMA)
    inputs = batch(TINY["vocab_size"], device)
    losses = [model.train()(**inputs).loss for model in (stock, patched)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


def test_the_command_trains_as_without_the_plugin(config):
    short = {"sequence_len": 16, "max_steps": 4, "gradient_accumulation_steps": 1, "logging_steps": 1}
    environment = {**os.environ, "AXOLOTL_DO_NOT_TRACK": "1", "PYTHONPATH": str(EXAMPLE)}
    environment |= {} if HAS_GPU else {"ACCELERATE_USE_CPU": "true"}
    runs = []
    for plugins in ([], PLUGINS):
        path = config(plugins, **FULL, **short)  # a LoRA begins at random
        command = [sys.executable, "-m", "axolotl.cli.main", "train", str(path), "--launcher", "python"]
        done = subprocess.run(command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
        printed = done.stdout + done.stderr
        assert ("linear_cross_entropy" in printed) == bool(plugins)
        runs.append([float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", printed)])
    assert len(runs[0]) == 4
    assert runs[0][-1] < runs[0][0]
    assert runs[1] == pytest.approx(runs[0], abs=2e-3)
