"""LIGER_DISABLE: a process in which nothing of ours runs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

from liger import disabled

PROGRAM = """
import logging

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import liger
from liger.adapter import Adapter
from liger.apply_liger_kernel import apply_liger_kernel
from liger.layers import RMSNorm
from liger.nn import SwiGLU
from liger.ops import launch, rms_norm
from liger.patch import apply_adapters
from liger.testing import TINY

logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
model, x = LlamaForCausalLM(LlamaConfig(**TINY)), torch.randn(2, 8)
liger.patch.adapters_for = None  # no adapter is looked for
before = [type(m) for m in model.modules()], LlamaForCausalLM.__init__
adapter = Adapter("transformers.models.llama.modeling_llama", modules={"LlamaRMSNorm": RMSNorm("variance_epsilon")})
patches = [apply_adapters(model, [adapter], norm=True), liger.apply(model), apply_liger_kernel(adapter)()]
assert before == ([type(m) for m in model.modules()], LlamaForCausalLM.__init__)
for patch in patches:
    assert not patch.swapped
    assert str(patch) == "liger.Patch\\n  nothing is swapped: LIGER_DISABLE is set", patch
    patch.undo()

on = x.cuda() if torch.cuda.is_available() else x
assert launch.triton is None or launch.INTERPRETED or on.is_cuda, "there is no kernel that could run"
assert not launch.runs_kernels(on)
rms_norm(on), SwiGLU(8, 8, device=on.device)(on)
"""


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_nothing_is_swapped_no_kernel_runs_and_it_is_said_once():
    said = [line for line in run(PROGRAM, LIGER_DISABLE="1").splitlines() if "liger" in line]
    assert said == ["WARNING liger.patch LIGER_DISABLE is set: nothing is swapped, and the ops run their references"]


@pytest.mark.parametrize(("value", "expected"), [("", False), ("0", False), ("1", True), ("true", True)])
def test_which_values_disable(monkeypatch, value, expected):
    monkeypatch.setenv("LIGER_DISABLE", value)
    try:
        importlib.reload(disabled)
        assert disabled.DISABLED is expected
    finally:
        monkeypatch.undo()
        importlib.reload(disabled)
