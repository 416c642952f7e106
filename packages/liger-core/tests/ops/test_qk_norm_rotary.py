"""qk_norm_rotary against fp64, through the kernels and through the reference; Hugging Face's modules are the model.

Over 300 lines: an op has one file of tests.
"""

from __future__ import annotations

import pytest
import torch

from liger.ops import qk_norm_rotary, rms_norm, rotary
from liger.ops import qk_norm_rotary_kernels as kernels
from liger.ops.rms_norm import Cast
from liger.testing import assert_as_exact_as
from rotary_in_torch import rotated

pytestmark = pytest.mark.usefixtures("poisoned_memory")

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [
    pytest.param(FP32, FP32, FP32, id="fp32"),
    pytest.param(BF16, BF16, BF16, id="bf16"),
    pytest.param(FP16, FP16, FP16, id="fp16"),
    pytest.param(BF16, FP32, BF16, id="bf16-fp32weight"),
    pytest.param(BF16, BF16, FP32, id="bf16-fp32cos"),
    pytest.param(FP32, BF16, BF16, id="fp32-bf16weight"),
    pytest.param(BF16, FP16, BF16, id="bf16-fp16weight"),
]
CASTS = [("llama", 0.0), ("gemma", 1.0)]
NAMES = ["q_out", "k_out", "dq", "dk", "dq_weight", "dk_weight"]


def stock(q, k, q_weight, k_weight, cos, sin, eps=1e-6, *, offset=0.0, cast="llama", unsqueeze_dim=2):
    """What transformers computes: each norm with its casts, then the rotation of the first columns."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def one(x, weight):
        wide = torch.promote_types(x.dtype, torch.float32)
        x_hat = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            x = x_hat.to(x.dtype)
        elif cast == "llama":
            x = (weight + offset) * x_hat.to(x.dtype)
        else:
            x = (x_hat * (offset + weight.to(wide))).to(x.dtype)
        return rotated(x, cos, sin)

    return one(q, q_weight), one(k, k_weight)


def make(device, dtypes=(FP32, FP32, FP32), batch=2, length=5, heads=(3, 2), columns=16, width=None, angles=1):
    dtype, weight_dtype, cos_dtype = dtypes
    q, k = (torch.randn(batch, length, n, columns, device=device).to(dtype) for n in heads)
    q_weight, k_weight = (torch.rand(columns, device=device).to(weight_dtype) for _ in range(2))
    # Any cos and sin: not of norm 1, with halves that differ.
    cos, sin = (torch.randn(angles, length, width or columns, device=device).to(cos_dtype) for _ in range(2))
    return q, k, q_weight, k_weight, cos, sin


def check(inputs, **options) -> None:
    """Both outputs and all gradients obey the error rule, against the stock functions."""
    upstream = [torch.randn_like(x) for x in inputs[:2]]

    def run(function, dtype=None):
        tensors = [None if t is None else t.detach().to(dtype or t.dtype) for t in inputs]
        leaves = [t.requires_grad_() for t in tensors[:4] if t is not None]
        outputs = function(*tensors, **options)
        dys = [dy.to(y.dtype) for dy, y in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]

    names = [name for name, t in zip(NAMES, [True, True, *inputs[:4]], strict=True) if t is not None]
    for name, actual, own, exact in zip(names, run(qk_norm_rotary), run(stock), run(stock, torch.float64), strict=True):
        assert_as_exact_as(actual, own, exact, name)


@pytest.mark.parametrize("dtypes", [p.values for p in DTYPES], ids=[p.id for p in DTYPES])
@pytest.mark.parametrize(("cast", "offset"), CASTS)
def test_matches_fp64(device, path, dtypes, cast: Cast, offset):
    check(make(device, dtypes, heads=(4, 2), columns=64, angles=2), eps=1e-5, cast=cast, offset=offset)


def test_without_an_eps(device, path):
    """The heads that a program has beside the last one are 0."""
    check(make(device, heads=(3, 3)), eps=0.0)


@pytest.mark.parametrize("heads", [(3, 1), (1, 1), (7, 7), (2, 5), (4, 0), (0, 4)])
def test_head_counts(device, path, heads):
    check(make(device, heads=heads))
    check(make(device, heads=heads, columns=2))


@pytest.mark.parametrize(
    ("columns", "width"), [(6, 2), (80, 80), (96, 96), (128, 128), (256, 256), (80, 32), (96, 72), (64, 2)]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_head_widths_and_partial_rotation(device, path, dtype, columns, width):
    check(make(device, (dtype,) * 3, 1, 3, (5, 1), columns, width))


@pytest.mark.parametrize(("cast", "offset"), CASTS)
@pytest.mark.parametrize("missing", [(2, 3), (2,), (3,)], ids=["both", "q's", "k's"])
def test_without_weights(device, path, missing, cast: Cast, offset):
    inputs = make(device, (BF16, FP32, BF16))
    check([None if i in missing else t for i, t in enumerate(inputs)], cast=cast, offset=offset)


def test_weights_of_two_dtypes(device, path):
    q, k, q_weight, k_weight, cos, sin = make(device, (BF16, BF16, BF16))
    check((q, k, q_weight, k_weight.float(), cos, sin))


@pytest.mark.parametrize("batch", [1, 3])
def test_angles_of_one_batch_or_of_each(device, path, batch):
    inputs = make(device, batch=3, angles=batch)
    check(inputs)
    cos, sin = (torch.randn(1, 5, 16, device=device) for _ in range(2))
    check((*inputs[:4], cos.expand(3, 5, 16), sin.expand(3, 5, 16)))
    check((*inputs[:4], cos, torch.randn(1, 5, 32, device=device)[..., :16]))  # each of them its own strides


def test_more_heads_than_a_program_works_on_at_once(device, path, monkeypatch):
    monkeypatch.setattr(kernels, "_TILE", 32)
    check(make(device, heads=(5, 3), width=12))


def test_more_tokens_than_programs(device, path):
    check(make(device, batch=3, length=7))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("layout", ["token-major", "head-major", "slices of one projection", "strided columns"])
def test_any_strides_and_results_as_attention_reads_them(device, path, layout, unsqueeze_dim):
    _, _, *rest = make(device)
    if layout == "token-major":
        q, k = (torch.randn(2, 5, n, 16, device=device) for n in (3, 2))
    elif layout == "head-major":
        q, k = (torch.randn(2, n, 5, 16, device=device).transpose(1, 2) for n in (3, 2))
    elif layout == "slices of one projection":
        qkv = torch.randn(2, 5, 7 * 16, device=device)
        q, k = qkv[..., :48].view(2, 5, 3, 16), qkv[..., 48:80].view(2, 5, 2, 16)
    else:
        q, k = (torch.randn(2, 5, n, 32, device=device)[..., ::2] for n in (3, 2))
    if unsqueeze_dim == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    check((q, k, *rest), unsqueeze_dim=unsqueeze_dim)
    if path == "kernel":
        q.requires_grad_()
        for y in qk_norm_rotary(q, k, *rest, unsqueeze_dim=unsqueeze_dim):
            assert (y.transpose(1, 2) if unsqueeze_dim == 1 else y).is_contiguous()
            assert y._base is None
        (dq,) = torch.autograd.grad(
            qk_norm_rotary(q, k, *rest, unsqueeze_dim=unsqueeze_dim)[0], q, torch.randn(q.shape, device=device)
        )
        assert (dq.transpose(1, 2) if unsqueeze_dim == 1 else dq).is_contiguous()


@pytest.mark.parametrize(("cast", "offset"), CASTS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (BF16, None)])
def test_rounds_where_the_two_ops_round(device, path, cast: Cast, offset, dtype, weight_dtype):
    """A rounding left out, or one more, shows in some of many elements."""
    q, k, *weights, cos, sin = make(device, (dtype, weight_dtype or dtype, dtype), length=9, columns=64, width=32)
    q_weight, k_weight = weights if weight_dtype else (None, None)
    both = qk_norm_rotary(q, k, q_weight, k_weight, cos, sin, offset=offset, cast=cast)
    normed = [rms_norm(x, w, offset=offset, cast=cast) for x, w in ((q, q_weight), (k, k_weight))]
    for actual, expected in zip(both, rotary(*normed, cos, sin, 2), strict=True):
        # Equal but for a last digit here and there: a GPU's compiler contracts products and sums. In x's own dtype:
        # with an fp32 weight the result is fp32, and its last digits show every contraction.
        differs = (actual.to(dtype) != expected.to(dtype)).float().mean()
        assert differs < (0.002 if device.type == "cuda" else 1e-9)


@pytest.mark.parametrize(
    ("name", "cast", "offset"), [("qwen3", "llama", 0.0), ("gemma3", "gemma", 1.0)], ids=["qwen3", "gemma3"]
)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_as_exact_as_transformers_own_modules(device, path, name, cast: Cast, offset, dtype):
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    norm_class = getattr(modeling, f"{name.capitalize()}RMSNorm")
    q, k, q_weight, k_weight, cos, sin = make(device, (dtype,) * 3, heads=(4, 2), columns=32)

    def model(q, k, q_weight, k_weight, cos, sin):
        norms = [norm_class(32, eps=1e-6).to(device, w.dtype) for w in (q_weight, k_weight)]
        for norm, weight in zip(norms, (q_weight, k_weight), strict=True):
            del norm.weight
            norm.weight = weight
        if q.dtype == torch.float64:  # the modules compute in fp32 whatever they are given
            return stock(q, k, q_weight, k_weight, cos, sin, cast=cast, offset=offset, unsqueeze_dim=1)
        if name == "qwen3":  # normalises before it transposes
            q, k = norms[0](q.transpose(1, 2)).transpose(1, 2), norms[1](k.transpose(1, 2)).transpose(1, 2)
        else:
            q, k = norms[0](q), norms[1](k)
        return modeling.apply_rotary_pos_emb(q, k, cos, sin)

    def ours(*inputs):
        return qk_norm_rotary(*inputs, cast=cast, offset=offset, unsqueeze_dim=1)

    upstream = [torch.randn(2, n, 5, 32, device=device) for n in (4, 2)]

    def run(function, to):
        tensors = [t.to(to) for t in (q.transpose(1, 2), k.transpose(1, 2), q_weight, k_weight, cos, sin)]
        leaves = [t.detach().requires_grad_() for t in tensors[:4]]
        outputs = function(*leaves, *tensors[4:])
        return [*outputs, *torch.autograd.grad(outputs, leaves, [dy.to(to) for dy in upstream])]

    for what, actual, own, exact in zip(
        NAMES, run(ours, dtype), run(model, dtype), run(model, torch.float64), strict=True
    ):
        assert_as_exact_as(actual, own, exact, what)


def test_gradient_of_the_angles_where_they_need_one(device, path):
    *inputs, cos, sin = make(device)
    angles = [cos.requires_grad_(), sin.requires_grad_()]
    results = [
        torch.autograd.grad([y.square().sum() for y in function(*inputs, *angles)], angles)
        for function in (qk_norm_rotary, stock)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("used", [0, 1])
def test_one_output_unused(device, path, used):
    inputs = make(device)
    results = []
    for function in (qk_norm_rotary, stock):
        leaves = [t.detach().requires_grad_() for t in inputs[:4]]
        function(*leaves, *inputs[4:])[used].square().sum().backward()
        results.append([t.grad for t in leaves])
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        if i % 2 == used:
            torch.testing.assert_close(actual, expected)
        else:
            assert actual is None or not actual.any()


@pytest.fixture
def asked(monkeypatch):
    """The options of each launch of a kernel."""
    pytest.importorskip("triton")
    options, launch = [], kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda *args, **more: options.append(more) or launch(*args, **more))
    return options


def test_an_unused_output_costs_no_work(device, asked):
    inputs = make(device)
    for t in inputs[:4]:
        t.requires_grad_()
    qk_norm_rotary(*inputs)[1].sum().backward()
    assert [(o["HEADS1"], o["HEADS2"]) for o in asked[1:]] == [(2, 0)]
    assert [t.grad is None for t in inputs[:4]] == [True, False, True, False]


@pytest.mark.parametrize(
    ("trained", "asked_for"),
    [
        ((0, 1), (3, 2, False)),
        ((0, 2), (3, 0, True)),
        ((1,), (2, 0, False)),
        ((3,), (2, 0, True)),
        ((0, 3), (3, 2, True)),
    ],
)
def test_frozen_inputs_get_no_gradient(device, trained, asked_for, asked):
    inputs = make(device)
    results = []
    for function in (qk_norm_rotary, stock):
        leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs[:4])]
        q_out, k_out = function(*leaves, *inputs[4:])
        (q_out.square().sum() + k_out.square().sum()).backward()
        results.append([t.grad for t in leaves])
    assert [(o["HEADS1"], o["HEADS2"], o["NEEDS_DW"]) for o in asked[1:]] == [asked_for]
    for i, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert (actual is None) == (expected is None) == (i not in trained)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


def test_same_bits_every_time(device, path):
    inputs = make(device, batch=3, length=9)
    leaves = [t.requires_grad_() for t in inputs[:4]]
    upstream = [torch.randn_like(t) for t in inputs[:2]]
    runs = [torch.autograd.grad(qk_norm_rotary(*inputs), leaves, upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_weights_do_not_share_a_gradient(device, path):
    inputs = make(device)
    for t in inputs[2:4]:
        t.requires_grad_()
    sum(y.square().sum() for y in qk_norm_rotary(*inputs)).backward()
    before = inputs[3].grad.clone()
    inputs[2].grad.zero_()
    assert torch.equal(inputs[3].grad, before)


Q, K, W, COS = torch.ones(2, 3, 4, 8), torch.ones(2, 3, 1, 8), torch.ones(8), torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unsqueeze_dim": 0}, ValueError, "unsqueeze_dim must be 1 or 2, not 0"),
        ({"cast": "qwen"}, ValueError, "cast must be 'llama' or 'gemma', not 'qwen'"),
        ({"q": Q.long()}, TypeError, "q must have a floating-point dtype, not torch.int64"),
        ({"k": K.half()}, TypeError, "k has dtype torch.float16"),
        ({"sin": COS.double()}, TypeError, "sin torch.float64, expected .* torch.float32"),
        ({"cos": COS.to("meta")}, ValueError, "cos is on meta, expected q's device cpu"),
        ({"q_weight": W.to("meta")}, ValueError, "q_weight is on meta"),
        ({"k_weight": W[:7]}, ValueError, r"k_weight has shape \(7,\), expected \(8,\)"),
        ({"q_weight": W.long()}, TypeError, "q_weight must have a floating-point dtype"),
        ({"q": Q[0]}, ValueError, r"q has shape \(3, 4, 8\), expected 4 dimensions"),
        ({"k": K[:, :2]}, ValueError, r"k has shape \(2, 2, 1, 8\), expected q's \(2, 3, 4, 8\)"),
        ({"unsqueeze_dim": 1}, ValueError, r"k has shape \(2, 3, 1, 8\), expected q's .* dimension 1"),
        ({"cos": COS[:, :2]}, ValueError, r"cos has shape \(1, 2, 8\), expected \(2 or 1, 3, R\)"),
        ({"cos": torch.ones(3, 3, 8)}, ValueError, r"cos has shape \(3, 3, 8\), expected \(2 or 1, 3, R\)"),
        ({"cos": torch.ones(1, 3, 10)}, ValueError, "cos has 10 columns, expected an even number up to q's 8"),
        ({"cos": COS[..., :3]}, ValueError, "cos has 3 columns, expected an even number"),
        ({"sin": COS[..., :4]}, ValueError, r"sin has shape \(1, 3, 4\), expected cos's \(1, 3, 8\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        qk_norm_rotary(**({"q": Q, "k": K, "q_weight": W, "k_weight": W, "cos": COS, "sin": COS} | change))
