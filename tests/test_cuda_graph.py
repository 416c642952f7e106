"""A training step of a patched model, captured in a CUDA graph: forward, backward and optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import liger
from liger.testing import TINY
from liger.testing.tiny import batch, build


def step(model, optimizer, inputs):
    optimizer.zero_grad(set_to_none=False)
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    optimizer.step()
    return loss


def in_training(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, capturable=True)
    return model, optimizer


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_is_captured_and_replayed(device, recompute):
    config = LlamaConfig(**{**TINY, "attn_implementation": "sdpa"})
    first = build(LlamaForCausalLM, config, device)
    liger.apply(first, recompute=recompute)
    captured, eager = in_training(copy.deepcopy(first)), in_training(first)
    inputs = [batch(config.vocab_size, device), batch(config.vocab_size, device)]
    inputs[1]["labels"] = inputs[1]["labels"].roll(1, 0)
    static = {name: t.clone() for name, t in inputs[0].items()}

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*captured, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step(*captured, static)
    for _ in range(3):
        step(*eager, inputs[0])

    for number in range(6):
        given = inputs[number % 2]
        for name, tensor in static.items():
            tensor.copy_(given[name])
        graph.replay()
        torch.testing.assert_close(loss, step(*eager, given), rtol=1e-5, atol=1e-5)
    for replayed, stepped in zip(captured[0].parameters(), eager[0].parameters(), strict=True):
        torch.testing.assert_close(replayed, stepped, rtol=1e-4, atol=1e-5)
