"""recompute beside what else changes a model or its backward: LoRA, autocast, checkpoints, hooks, compilers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adapted_models import llama
from liger.testing.tiny import batch
from recomputing import LAYERS, TOKENS, WIDTH, H, apply, assert_equal, kept, pair, step

pytestmark = pytest.mark.usefixtures("no_interpreter")


@pytest.mark.parametrize("order", ["lora first", "patch first"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora(device, order, dropout):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    results, sizes = [], []
    for on in (True, False):
        model = llama(device)
        if order == "patch first":
            apply(model, recompute=on)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
        model = peft.get_peft_model(model, config)
        if order == "lora first":
            apply(model, recompute=on)
        torch.manual_seed(1)
        results.append(step(model))
        sizes.append(kept(model))
    assert_equal(*results)
    # The first norm's input needs no gradient: nothing is kept of it. With dropout LoRA keeps what that returns.
    norms = 2 * LAYERS - 1
    assert sizes[1] - sizes[0] == (0 if dropout else 4 * (TOKENS * (norms * H + LAYERS * WIDTH) - norms * H))


def test_autocast_rebuilds_the_cast_copies(device, path):
    on, off = pair(device)

    def forward(model):
        def call(inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return model(**inputs, use_cache=False).loss

        return call

    assert_equal(*(step(model, lambda model=model, **inputs: forward(model)(inputs)) for model in (on, off)))
    # q, k, v, gate and up keep a bf16 copy each, of a norm's output in fp32, and down_proj the product in bf16 (which
    # the reference computes from fp32 copies).
    product = WIDTH if path == "kernel" else 0
    expected = LAYERS * (TOKENS * (5 * H + product) * 2 - 2 * H * 4)
    assert kept(off, forward(off)) - kept(on, forward(on)) == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(device, reentrant):
    on, off = pair(device)
    for model in (on, off):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(step(on), step(off))
    assert kept(on) <= kept(off)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model(device, reentrant):
    on, off = pair(device)
    results = []
    for model in (on, off):
        embeds = model.get_input_embeddings()(batch(99, device)["input_ids"])

        def call(embeds, model=model):
            return model(inputs_embeds=embeds, labels=batch(99, device)["labels"], use_cache=False).loss

        results.append(
            step(model, lambda embeds=embeds, call=call, **_: checkpoint(call, embeds, use_reentrant=reentrant))
        )
    assert_equal(*results)


def test_hooks_of_the_user_see_all_that_they_saw(device):
    """torch lets the inner hooks hide the outer ones; so no region is opened inside them."""
    seen = []
    for model in pair(device):
        shapes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=shapes: (s.append(t.shape), t.detach())[1], lambda t: t
        )
        with hooks:
            loss = model(**batch(99, device)).loss
        loss.backward()
        seen.append((shapes, [p.grad for p in model.parameters()]))
    assert seen[0][0] == seen[1][0]
    assert_equal(seen[0][1], seen[1][1])


def test_torch_func(device, path):
    """Its transforms allow no hooks, and the kernels' Functions no transform."""
    results = []
    for model in pair(device):
        parameters = {name: p.detach() for name, p in model.model.named_parameters()}

        def loss(parameters, model=model):
            ids = batch(99, device)["input_ids"]
            return torch.func.functional_call(model.model, parameters, (ids,)).last_hidden_state.square().mean()

        results.append(list(torch.func.grad(loss)(parameters).values()))
    assert_equal(*results)


@pytest.mark.parametrize("what", ["model", "layers"])
def test_compiled(device, what):
    """The whole model as one graph: no region. Its layers, inside a region of the model's: they keep what they keep."""
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager_decomp_partition" if device.type == "cpu" else "inductor"}
    on, off = pair(device)
    expected = step(off)
    if what == "model":
        compiled = torch.compile(on, **options)
        actual = step(on, lambda **inputs: compiled(**inputs).loss)
    else:
        for layer in on.model.layers:
            layer.compile(**options)
        actual = step(on)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
