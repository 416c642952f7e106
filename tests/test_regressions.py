"""What has gone wrong in other libraries of fused kernels, one test a case, with the thread that reported it.

Four numbers are tested elsewhere:

21  DDP, FSDP, ZeRO-3 with a trainable head, all ranks' gradients: `tests/distributed`
22  adapters on or around the head: `tests/test_peft.py`
24  one denominator for accumulated and parallel batches: `tests/test_trainer.py`, and `tests/distributed`, "ddp,
    num_items_in_batch"
25  logits, evaluation and generation beside a fused loss: `tests/test_trainer.py`, the contract
    (`test_logits_are_there_for_who_reads_them`, `test_without_labels_nothing_of_the_loss_differs`, `test_generate`)
    and liger-core's `test_loss_request.py` and `test_lazy_logits.py`

Over 300 lines: the cases are one list, in the order of their numbers.
"""

from __future__ import annotations

import copy
import functools
import random
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as transformers_rotary

import liger
from liger.lazy_logits import LazyLogits
from liger.ops import cross_entropy, launch, linear_chunks, linear_cross_entropy, rms_norm, rotary, swiglu
from liger.testing import TINY, assert_as_exact_as
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build

pytestmark = pytest.mark.usefixtures("no_interpreter", "poisoned_memory")


def llama(device, **options):
    return build(LlamaForCausalLM, LlamaConfig(**{**TINY, **options}), device)


def torch_cross_entropy(logits, target, *, denominator=None, softcap=None, reduction="mean"):
    """What a model writes: fp32 logits (fp64 for fp64), then torch's loss."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    loss = F.cross_entropy(z.flatten(0, -2), target.flatten(), reduction="sum" if denominator else reduction)
    return loss / denominator if denominator else loss.view(target.shape) if reduction == "none" else loss


def torch_linear_cross_entropy(x, weight, target, *, linear_bias=None, logit_scale=1.0, **options):
    return torch_cross_entropy(F.linear(x, weight, linear_bias) * logit_scale, target, **options)


def head(rows, width, columns, device, dtype=torch.float32, ignored=0.0):
    """x, weight, bias and target."""
    x, bias = torch.randn(rows, width, device=device), torch.randn(columns, device=device)
    weight = 2 * torch.randn(columns, width, device=device) / width**0.5
    target = torch.randint(0, columns, (rows,), device=device)
    target = target.masked_fill(torch.rand(rows, device=device) < ignored, -100)
    return x.to(dtype), weight.to(dtype), bias.to(dtype), target


def results(loss_of, tensors, upstream=None):
    """The loss of fresh leaves with these values, and its gradients."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]
    loss = loss_of(*leaves)
    return [loss, *torch.autograd.grad(loss, leaves, upstream if upstream is None else upstream.to(loss.dtype))]


def assert_right(loss_of, torch_loss_of, tensors, upstream=None):
    """`loss_of` is as exact as torch's own, in value and gradients; returns both."""
    actual = results(loss_of, tensors, upstream)
    own = results(torch_loss_of, tensors, upstream)
    exact = results(torch_loss_of, [t.double() for t in tensors], upstream)
    for i, three in enumerate(zip(actual, own, exact, strict=True)):
        assert_as_exact_as(*three, "loss" if i == 0 else f"gradient {i}")
    return actual


def fused(target, **options):
    return lambda x, weight, bias: linear_cross_entropy(x, weight, target, linear_bias=bias, **options)


def unfused(target, **options):
    return lambda x, weight, bias: torch_linear_cross_entropy(x, weight, target, linear_bias=bias, **options)


def test_01_all_labels_ignored(device, path):
    """linkedin/Liger-Kernel#177 (ZeroDivisionError), meta-pytorch/torchtune#2341."""
    x, weight, bias, target = head(6, 8, 30, device, ignored=1.0)
    logits = F.linear(x, weight, bias)
    for loss, *gradients in (
        results(fused(target, reduction="sum", denominator=5), [x, weight, bias]),
        results(lambda z: cross_entropy(z, target, reduction="sum", denominator=5), [logits]),
    ):
        assert loss == 0
        assert not any(g.any() for g in gradients)
    for ours, theirs in (
        (results(fused(target), [x, weight, bias]), results(unfused(target), [x, weight, bias])),
        (
            results(lambda z: cross_entropy(z, target), [logits]),
            results(lambda z: F.cross_entropy(z, target), [logits]),
        ),
    ):
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)
        assert not any(g.any() for g in ours[1:])


def test_02_ignored_labels_in_a_compiled_graph(device):
    """linkedin/Liger-Kernel#1338: 21.40 became 61.73, in silence."""
    torch._dynamo.reset()
    *tensors, target = head(256, 32, 4096, device, ignored=0.25)
    compile = functools.partial(
        torch.compile, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager"
    )
    for actual, eager in zip(results(compile(fused(target)), tensors), results(fused(target), tensors), strict=True):
        torch.testing.assert_close(actual, eager)
    assert_right(fused(target), unfused(target), tensors)


@pytest.mark.gpu
def test_02_ignored_labels_in_a_cuda_graph(device):
    """linkedin/Liger-Kernel#1338."""
    *tensors, target = head(256, 32, 4096, device, torch.bfloat16, ignored=0.25)
    eager = results(fused(target), tensors)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results(fused(target), tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = results(fused(target), tensors)
    graph.replay()
    torch.cuda.synchronize()
    for actual, expected in zip(captured, eager, strict=True):
        torch.testing.assert_close(actual, expected)


def test_03_a_loss_of_each_token_times_a_mask(device, path):
    """linkedin/Liger-Kernel#968: gradients wrong, or all 0."""
    *tensors, target = head(16, 12, 50, device, ignored=0.2)
    mask = torch.randint(0, 2, (16,), device=device)
    assert_right(
        lambda *t: (fused(target, reduction="none")(*t) * mask).sum(),
        lambda *t: (unfused(target, reduction="none")(*t) * mask).sum(),
        tensors,
    )


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
def test_04_without_gradients_the_loss_is_right(device, path, how):
    """linkedin/Liger-Kernel#930 (UnboundLocalError), #507 (a loss of 0.0)."""
    x, weight, bias, target = head(5, 8, 3, device)
    expected = torch_linear_cross_entropy(x, weight, target, linear_bias=bias)
    if how == "no_grad":
        x.requires_grad_()
    with torch.set_grad_enabled(how != "no_grad"):
        losses = fused(target)(x, weight, bias), cross_entropy(F.linear(x, weight, bias), target)
    for loss in losses:
        torch.testing.assert_close(loss, expected)
        assert loss > 0


@pytest.mark.parametrize("p", [0.9, 0.99, 0.999])
def test_05_gradient_of_the_true_class_near_certainty(device, path, p):
    """linkedin/Liger-Kernel#1329: p − 1 of a rounded p is off by 100% at p = 0.999."""
    logits = torch.zeros(1, 1001, device=device)
    logits[0, 5] = torch.tensor(p * 1000 / (1 - p)).log()
    target = torch.tensor([5], device=device)
    x, weight = torch.zeros(1, 4, device=device), torch.zeros(1001, 4, device=device)
    in_bf16 = [t.bfloat16() for t in (x, weight, logits[0])]
    _, ours = results(lambda z: cross_entropy(z, target), [logits.bfloat16()])
    *_, fused_ours = results(fused(target), in_bf16)
    _, exact = results(lambda z: F.cross_entropy(z, target), [logits.bfloat16().double()])
    for gradient in (ours[0, 5], fused_ours[5]):
        assert (gradient / exact[0, 5] - 1).abs() < 2**-8


@pytest.mark.parametrize("count", [1, 16, 1024])
def test_06_dw_in_bf16_is_as_exact_in_many_chunks_as_in_one(device, monkeypatch, count):
    """linkedin/Liger-Kernel#1391, #512: training diverged."""
    rows = 1024 // count
    monkeypatch.setattr(linear_chunks, "chunks", lambda *_: [(i, i + rows) for i in range(0, 1024, rows)])
    *tensors, target = head(1024, 16, 50, device, torch.bfloat16)
    assert_right(fused(target), unfused(target), tensors)


@pytest.mark.parametrize("columns", [3, 32001, 129920, 151936, 256000])
def test_07_log_probs_are_never_positive(device, path, columns):
    """volcengine/verl#2899, #2656: each lane past V added exp(0)."""
    x, weight, bias, target = head(2, 4, columns, device)
    bias[target[0]] = 40.0
    loss, *_ = assert_right(
        fused(target, reduction="none"),
        unfused(target, reduction="none"),
        [x, weight, bias],
        torch.ones(2, device=device),
    )
    assert (loss >= 0).all()


@pytest.mark.parametrize("softcap", [1.0, 30.0])
@pytest.mark.parametrize("columns", [32001, 256000])
def test_08_a_softcap_does_not_bring_padding_into_the_sum(device, path, softcap, columns):
    """unslothai/unsloth#10616: softcap · tanh(−inf) is −softcap."""
    target = torch.tensor([7], device=device)
    x, weight = torch.zeros(1, 4, device=device), torch.zeros(columns, 4, device=device)
    tensors = [x, weight, torch.full((columns,), -3.0, device=device)]
    assert_right(fused(target, softcap=softcap), unfused(target, softcap=softcap), tensors)


def test_09_all_logits_but_one_minus_infinity(device, path):
    """Dao-AILab/flash-attention#1930: NaN where a whole tile is −inf."""
    x, weight, bias, target = head(2, 4, 9001, device)
    bias[:] = float("-inf")
    target[:] = 8999
    bias[8999] = 1.0
    for loss, *gradients in (
        results(fused(target), [x, weight, bias]),
        results(lambda z: cross_entropy(z, target), [F.linear(x, weight, bias)]),
    ):
        assert loss == 0
        assert not any(g.any() for g in gradients)


def test_10_transposed_logits_and_an_upstream_gradient_of_stride_zero(device, path):
    """NVIDIA/TransformerEngine#2734, ROCm/TransformerEngine#623."""
    logits = torch.randn(5, 3, 40, device=device).transpose(0, 1)
    target = torch.randint(0, 40, (3, 5), device=device)
    upstream = torch.tensor(0.5, device=device).expand(3, 5)
    assert_right(
        lambda z: cross_entropy(z, target, reduction="none"),
        lambda z: torch_cross_entropy(z, target, reduction="none"),
        [logits],
        upstream,
    )


def test_11_one_tensor_of_logits_in_two_losses_and_two_backwards(device, path):
    """linkedin/Liger-Kernel#272, unslothai/unsloth#5002: softmax saved the output that the loss wrote into."""
    x, target = torch.randn(4, 60, device=device), torch.randint(0, 60, (4,), device=device)

    def twice(loss, x):
        leaf = x.clone().requires_grad_()
        logits = leaf.softmax(-1)
        before = logits.detach().clone()
        total = loss(logits, target) + 2 * loss(logits, target.roll(1))
        gradients = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(logits, before)
        return gradients

    for three in zip(
        twice(cross_entropy, x), twice(F.cross_entropy, x), twice(F.cross_entropy, x.double()), strict=True
    ):
        assert_as_exact_as(*three)


def test_12_a_residual_reads_the_same_upstream_gradient_as_the_norm(device, path):
    """linkedin/Liger-Kernel#370, #376: Gemma 2's norm wrote into it."""
    weight, x, g = torch.rand(16, device=device), torch.randn(3, 16, device=device), torch.randn(3, 16, device=device)
    before = g.clone()
    leaf = x.requires_grad_()
    (dx,) = torch.autograd.grad(leaf + rms_norm(leaf, weight), leaf, g)
    assert torch.equal(g, before)
    (expected,) = torch.autograd.grad(leaf + F.rms_norm(leaf, (16,), weight, 1e-6), leaf, g)
    torch.testing.assert_close(dx, expected)


def test_13_swiglu_of_a_producer_that_saved_its_output(device, path):
    """linkedin/Liger-Kernel#254: backward overwrote what exp needs."""
    gate, up = torch.randn(3, 24, device=device), torch.randn(3, 24, device=device)
    assert_right(
        lambda a, b: swiglu(a.exp(), b.exp()).sum(), lambda a, b: (F.silu(a.exp()) * b.exp()).sum(), [gate, up]
    )


@pytest.mark.parametrize("with_bias", [False, True])
def test_14_autocast_with_an_fp32_head(device, path, with_bias):
    """linkedin/Liger-Kernel#305, #501, #1283."""
    x, weight, bias, target = head(6, 16, 40, device)
    tensors = [x, weight, *([bias] if with_bias else [])]

    def autocast(function):
        def call(x, weight, bias=None):
            with torch.autocast(device.type, torch.bfloat16):
                return function(x, weight, target, linear_bias=bias)

        return call

    actual, own = (results(autocast(f), tensors) for f in (linear_cross_entropy, torch_linear_cross_entropy))
    exact = results(
        lambda x, w, b=None: torch_linear_cross_entropy(x, w, target, linear_bias=b), [t.double() for t in tensors]
    )
    assert all(t.dtype == torch.float32 for t in actual)
    for three in zip(actual, own, exact, strict=True):
        assert_as_exact_as(*three, computed_in=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (LlamaRMSNorm(32), {}),
        (Gemma2RMSNorm(32), {"offset": 1.0, "cast": "gemma"}),
        (Gemma3nRMSNorm(32, with_scale=False), {"cast": "gemma"}),
    ],
    ids=["llama", "gemma", "no weight"],
)
@pytest.mark.parametrize("weight_dtype", [torch.float32, None], ids=["fp32 weight", "weight as x"])
def test_15_norms_round_and_return_what_transformers_norms_do(device, path, module, options, dtype, weight_dtype):
    """linkedin/Liger-Kernel#74, #89, Dao-AILab/quack#12."""
    module = copy.deepcopy(module).to(device, weight_dtype or dtype)
    for weight in module.parameters():
        nn.init.uniform_(weight, -0.5, 0.5)
    weight = next(module.parameters(), None)
    x = torch.randn(7, 32, device=device, dtype=dtype)
    expected = module(x)
    actual = rms_norm(x, weight, 1e-6, **options)
    assert actual.dtype == expected.dtype
    assert_as_exact_as(actual, expected, copy.deepcopy(module).double()(x.double()), depth=2)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize(("columns", "rotated"), [(64, 64), (80, 80), (64, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_16_rope_of_one_kv_head_any_batch_part_of_a_head_and_fp32_angles(
    device, path, batches, columns, rotated, dtype
):
    """linkedin/Liger-Kernel#342 (k not rotated), #477 (one batch of angles only), #1451 (out of bounds)."""
    q = torch.randn(2, 3, 5, columns, device=device, dtype=dtype)
    k = torch.randn(2, 1, 5, columns, device=device, dtype=dtype)
    angles = torch.randn(batches, 5, rotated // 2, device=device).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def theirs(q, k, cos, sin):
        parts = transformers_rotary(q[..., :rotated], k[..., :rotated], cos, sin)
        return [torch.cat([p.to(t.dtype), t[..., rotated:]], -1) for p, t in zip(parts, (q, k), strict=True)]

    before = q.clone(), k.clone()
    exact = theirs(*(t.double() for t in (q, k, cos, sin)))
    for ours, own, right in zip(rotary(q, k, cos, sin), theirs(q, k, cos, sin), exact, strict=True):
        assert_as_exact_as(ours.to(own.dtype), own, right)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "cross_entropy"])
def test_17_a_row_past_two_to_the_31_elements(device, op):
    """linkedin/Liger-Kernel#803."""
    torch.use_deterministic_algorithms(False)  # poisoning gigabytes says nothing here
    x = torch.randn(1, 524289, 4096, device=device, dtype=torch.bfloat16)
    functions = {
        "rms_norm": lambda x: rms_norm(x, torch.ones(4096, device=device, dtype=x.dtype)),
        "swiglu": lambda x: swiglu(x, x),
        "cross_entropy": lambda x: cross_entropy(x, x[..., 0].long().abs(), reduction="none"),
    }
    last, y = x[:, -1:].clone().requires_grad_(), functions[op](x.requires_grad_())
    expected = functions[op](last)
    torch.testing.assert_close(y[:, -1:], expected)
    g = torch.ones_like(expected)
    (dx,) = torch.autograd.grad(y, x, torch.ones((), device=device, dtype=y.dtype).expand_as(y))
    torch.testing.assert_close(dx[:, -1:], torch.autograd.grad(expected, last, g)[0])


@pytest.mark.gpu
def test_18_a_device_that_is_not_current():
    """linkedin/Liger-Kernel#1303, modelscope/ms-swift#4186: an abnormal loss, and no error."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = llama(torch.device("cuda:0"))
    liger.apply(model)
    inputs = batch(TINY["vocab_size"], torch.device("cuda:0"))
    other = copy.deepcopy(model).to("cuda:1")
    assert torch.cuda.current_device() == 0
    loss = model(**inputs).loss
    loss_there = other(**{name: value.to("cuda:1") for name, value in inputs.items()}).loss
    loss.backward()
    loss_there.backward()
    torch.testing.assert_close(loss_there.to("cuda:0"), loss)
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to("cuda:0"), theirs.grad)


@pytest.mark.parametrize("order", ["apply, dispatch", "dispatch, apply"])
@pytest.mark.parametrize("devices", [("cpu", "cpu"), pytest.param((0, 1), marks=pytest.mark.gpu)], ids=["cpu", "gpus"])
def test_18_a_model_spread_over_devices(devices, order):
    """The same of `device_map="auto"`: accelerate's hooks, which move what comes to each module's device."""
    accelerate = pytest.importorskip("accelerate")
    if devices == (0, 1) and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first, second = devices
    stock = llama(torch.device(first))
    spread, inputs = copy.deepcopy(stock), batch(TINY["vocab_size"], torch.device(first))
    on = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
    on |= {"model.layers.1": second, "model.norm": second, "lm_head": second}
    if order == "apply, dispatch":
        liger.apply(spread)
    accelerate.dispatch_model(spread, on, force_hooks=True)
    if order == "dispatch, apply":
        assert not liger.apply(spread).swapped  # a kernel would pass the hooks by
    outputs, expected = spread(**inputs), stock(**inputs)
    assert isinstance(outputs.logits, LazyLogits) == (order == "apply, dispatch")
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.logits + 0, expected.logits)
    outputs.loss.backward()
    expected.loss.backward()
    for ours, theirs in zip(spread.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.to(theirs.device), theirs.grad)


def compiled_variants():
    return sum(
        len(caches[0])
        for name, module in list(sys.modules.items())
        if name.startswith("liger.ops.")
        for value in vars(module).values()
        if isinstance(value, launch.triton.JITFunction)
        for caches in value.device_caches.values()
    )


@pytest.mark.gpu
def test_19_new_batch_sizes_and_lengths_compile_nothing(device):
    """linkedin/Liger-Kernel#146: RoPE compiled anew for each length."""
    model, chance = llama(device).bfloat16(), random.Random(0)
    liger.apply(model)

    def step(rows, length):
        model(**batch(TINY["vocab_size"], device, rows, length)).loss.backward()

    step(2, 17), step(3, 40)
    before = compiled_variants()
    assert before >= 5, "the count does not see Triton's cache"
    for _ in range(50):
        step(chance.randint(1, 5), chance.randint(2, 60))
    assert compiled_variants() == before


@pytest.mark.gpu
def test_20_the_host_never_waits_for_the_gpu(device):
    """linkedin/Liger-Kernel#1292."""
    *tensors, target = head(64, 32, 500, device, torch.bfloat16, ignored=0.2)
    x, norm_weight = tensors[0].clone().requires_grad_(), torch.ones(32, device=device, dtype=torch.bfloat16)
    items = torch.tensor(50, device=device)

    def step():
        hidden = rms_norm(swiglu(x, x), norm_weight)
        loss = fused(target, reduction="sum", denominator=items)(hidden, *(t.requires_grad_() for t in tensors[1:]))
        loss.backward()

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Sizes(TorchDispatchMode):
    """The numbers of elements of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "view" not in str(func) and func not in (torch.ops.aten.t.default, torch.ops.aten.detach.default):
            self.seen |= {t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)}
        return out


def test_23_frozen_heads_and_norms_cost_no_gradient(device):
    """linkedin/Liger-Kernel#1441, #1440."""
    x, weight, _, target = head(8, 33, 501, device)

    def dx(trains):
        leaf, norm = x.clone().requires_grad_(), torch.full((33,), 0.7, device=device)
        w = weight.clone().requires_grad_(trains)
        with Sizes() as sizes:
            linear_cross_entropy(rms_norm(leaf, norm.requires_grad_(trains)), w, target).backward()
        return leaf.grad, norm.grad, w.grad, sizes.seen

    grad, *trained, sizes = dx(True)
    assert all(g is not None for g in trained)
    assert weight.numel() in sizes, "the recorder sees nothing"
    frozen_grad, *none, sizes = dx(False)
    assert none == [None, None]
    assert weight.numel() not in sizes
    torch.testing.assert_close(frozen_grad, grad)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_26_shift_labels_over_two_shards_of_a_sequence(device, path, mode):
    """huggingface/transformers#36607, linkedin/Liger-Kernel#888: the token at the boundary lost its target."""
    stock = getattr(llama(device), mode)()
    ids = batch(TINY["vocab_size"], device, 1, 10)["input_ids"]
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:]
    whole = stock(input_ids=ids, labels=ids, num_items_in_batch=9).loss
    liger.apply(stock)
    first = stock(
        input_ids=ids[:, :5], labels=ids[:, :5], shift_labels=shifted[:, :5], num_items_in_batch=9, use_cache=True
    )
    rest = {"labels": ids[:, 5:], "shift_labels": shifted[:, 5:], "num_items_in_batch": 9}
    second = stock(input_ids=ids[:, 5:], past_key_values=first.past_key_values, **rest)
    torch.testing.assert_close(first.loss + second.loss, whole)


def test_27_undo_leaves_nothing_and_nothing_else_is_touched(device):
    """huggingface/trl#6783, linkedin/Liger-Kernel#636, #1389: another model, and torch itself, stayed patched."""
    model, other = llama(device), llama(device)

    def traces(model):
        return [
            (type(m), type(m).forward, sorted(vars(m)), m._forward_hooks, m._forward_pre_hooks) for m in model.modules()
        ]

    keys, functions = list(model.state_dict()), (F.cross_entropy, F.linear, F.silu)
    inputs = batch(TINY["vocab_size"], device)
    loss = model(**inputs).loss
    before, others = traces(model), traces(other)
    patch = liger.apply(model)
    assert traces(other) == others
    model(**inputs).loss.backward()
    patch.undo()
    assert traces(model) == before
    assert list(model.state_dict()) == keys
    assert functions == (F.cross_entropy, F.linear, F.silu)
    assert torch.equal(model(**inputs).loss, loss)
    assert torch.equal(other(**inputs).loss, loss)


def test_28_the_order_makes_no_difference_and_what_cannot_be_had_is_no_silent_nothing(device):
    """linkedin/Liger-Kernel#199, #956 (a switch that did nothing), huggingface/transformers#34016, #44315."""
    from liger_llama import apply_liger_kernel_to_llama

    inputs = batch(TINY["vocab_size"], device)
    after = llama(device)
    patch = liger.apply(after)
    with apply_liger_kernel_to_llama():  # as in a model_init that is called later
        before = llama(device)
    assert [type(m) for m in before.modules()] == [type(m) for m in after.modules()]
    assert torch.equal(before(**inputs).loss, after(**inputs).loss)

    again = liger.apply(after)
    assert not again.swapped
    assert set(again.already) == {s.name for s in patch.swapped}

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = model

    assert len(liger.apply(Wrapper(llama(device))).swapped) == len(patch.swapped)
    with pytest.raises(ValueError, match="experts=True was asked for and can be applied nowhere"):
        liger.apply(llama(device), experts=True)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**TINY, final_logit_softcapping=2.0)),
        (
            MixtralForCausalLM,
            MixtralConfig(**TINY, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5),
        ),
    ],
    ids=["softcap", "auxiliary loss"],
)
def test_29_what_a_model_does_beside_the_plain_loss_is_kept(device, path, cls, config):
    """apple/ml-cross-entropy#48 (softcap off), huggingface/trl#7009 (auxiliary loss dropped)."""
    stock = build(cls, config, device)
    patched = copy.deepcopy(stock)
    assert not liger.apply(patched).declined
    assert_same_step(patched, stock, in_fp64(stock), batch(config.vocab_size, device))


FALCON = {"mamba_d_ssm": 48, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1}


@pytest.mark.parametrize(
    ("cls", "config", "scale"),
    [
        (CohereForCausalLM, CohereConfig(**TINY, logit_scale=0.25), 0.25),
        (GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=4.0), 0.25),
        (FalconH1ForCausalLM, FalconH1Config(**TINY, **FALCON, lm_head_multiplier=0.25), 0.25),
    ],
    ids=["cohere", "granite", "falcon_h1"],
)
def test_29_heads_that_scale_their_logits(device, path, cls, config, scale):
    """huggingface/trl#6629, unslothai/unsloth#11277: a loss of 7.90 in place of 2.02."""
    model = build(cls, config, device)
    inputs, hidden = batch(config.vocab_size, device), []
    model.lm_head.register_forward_pre_hook(lambda _, args: hidden.append(args[0].detach()))
    expected = model(**inputs).loss
    target = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    loss = linear_cross_entropy(hidden[0], model.lm_head.weight, target, logit_scale=scale)
    torch.testing.assert_close(loss, expected)
    (ours,) = torch.autograd.grad(loss, model.lm_head.weight)
    rest = torch_linear_cross_entropy(hidden[0], model.lm_head.weight, target, logit_scale=scale)
    torch.testing.assert_close(ours, torch.autograd.grad(rest, model.lm_head.weight)[0])
    with pytest.raises(liger.NoAdapterError, match=cls.__name__):
        liger.apply(model)


class DTensorLike(Tensor):
    device_mesh = None


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.empty(0), r"linear_weight is empty, shape \(0,\): has ZeRO-3 partitioned it\?"),
        (torch.ones(5, 8).as_subclass(DTensorLike), "linear_weight is a DTensor"),
    ],
)
def test_30_a_weight_without_its_data_is_refused_by_name(path, weight, said):
    """linkedin/Liger-Kernel#767 (ZeroDivisionError), apple/ml-cross-entropy#31 (illegal memory access)."""
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(torch.randn(3, 8), weight, torch.zeros(3, dtype=torch.int64))
