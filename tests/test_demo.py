"""The demo, in miniature: it runs, both runs are the same training, and the patched one needs less memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from environment_of_references import REFERENCES

ROOT = Path(__file__).parent.parent


def test_the_demo_trains_the_same_model_twice(tmp_path):
    pytest.importorskip("liger_llama")
    command = [sys.executable, "examples/demo.py", "--steps", "4", "--device", "cpu", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=REFERENCES, check=True, capture_output=True, text=True, timeout=300)
    assert "No Triton kernel ran" in done.stdout
    assert "linear_cross_entropy" in done.stdout, "what the patch swapped is shown"

    runs = json.loads((tmp_path / "demo.json").read_text("utf-8"))
    stock, patched = runs["stock"], runs["patched"]
    assert patched["losses"] == pytest.approx(stock["losses"], rel=1e-3)
    assert stock["losses"][-1] < stock["losses"][0]
    assert patched["peak_bytes"] < 0.8 * stock["peak_bytes"]
    assert patched["baseline_bytes"] == stock["baseline_bytes"]


def test_the_demos_tokenizer_loses_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from demo_text import Tokenizer, batches

    tokenizer = Tokenizer("a word, and a word, and\n  another word", vocabulary=260)
    for sentence in ("a word", "un mot, naïve\t…\n", ""):
        tokens = tokenizer.encode(sentence)
        assert tokenizer.decode(tokens) == sentence
        assert all(0 <= t < 260 for t in tokens.tolist())
    assert len(tokenizer.encode(" word")) == 1
    tokens = torch.arange(100)
    first, again = (batches(tokens, 3, 2, 8, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
