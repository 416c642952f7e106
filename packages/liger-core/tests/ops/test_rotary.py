"""rotary against fp64, through the kernels and through the reference; what Hugging Face computes is the model."""

from __future__ import annotations

import importlib

import pytest
import torch

from liger.ops import rotary, rotary_one
from liger.testing import assert_as_exact_as
from rotary_in_torch import rotated

pytestmark = pytest.mark.usefixtures("poisoned_memory")
rotary_module = importlib.import_module("liger.ops.rotary")  # `liger.ops.rotary` is the function

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.float32, id="bf16-fp32cos"),
    pytest.param(torch.float32, torch.bfloat16, id="fp32-bf16cos"),
    pytest.param(torch.bfloat16, torch.float16, id="bf16-fp16cos"),
]


def stock(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return rotated(q, cos, sin), rotated(k, cos, sin)


def check(q, k, cos, sin, unsqueeze_dim=1) -> None:
    """Both outputs and both gradients obey the error rule, against the stock function."""
    upstream = [torch.randn_like(x) for x in (q, k)]

    def run(function, dtype=None):
        leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in (q, k)]
        angles = [t.to(dtype or t.dtype) for t in (cos, sin)]
        outputs = function(*leaves, *angles, unsqueeze_dim)
        dys = [dy.to(y.dtype) for dy, y in zip(upstream, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, leaves, dys)]

    for name, actual, own, exact in zip(
        ("q_out", "k_out", "dq", "dk"), run(rotary), run(stock), run(stock, torch.float64), strict=True
    ):
        assert_as_exact_as(actual, own, exact, name)


def angles(batch, length, width, dtype, device):
    """Any cos and sin: not of norm 1, with halves that differ."""
    return (torch.randn(batch, length, width, device=device).to(dtype) for _ in range(2))


def token_major(batch, heads, length, columns, dtype, device):
    return torch.randn(batch, length, heads, columns, device=device).to(dtype).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "cos_dtype"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (1, 1), (7, 7)])
def test_matches_fp64(device, path, dtype, cos_dtype, heads, kv_heads):
    q, k = (token_major(2, n, 5, 64, dtype, device) for n in (heads, kv_heads))
    check(q, k, *angles(2, 5, 64, cos_dtype, device))


@pytest.mark.parametrize(
    ("columns", "width"), [(2, 2), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (80, 32), (96, 72), (64, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_widths_and_partial_rotation(device, path, dtype, columns, width):
    """A rotation of fewer columns than the head has must neither read past cos nor drop the rest (Phi-4 mini)."""
    q, k = (token_major(1, n, 3, columns, dtype, device) for n in (5, 1))
    check(q, k, *angles(1, 3, width, dtype, device))


@pytest.mark.parametrize("batch", [1, 3])
def test_angles_of_one_batch_or_of_each(device, path, batch):
    q, k = (token_major(3, n, 4, 16, torch.float32, device) for n in (2, 1))
    check(q, k, *angles(batch, 4, 16, torch.float32, device))
    cos, sin = angles(1, 4, 16, torch.float32, device)
    check(q, k, cos.expand(3, 4, 16), sin.expand(3, 4, 16))
    check(q, k, cos, torch.randn(1, 4, 32, device=device)[..., :16])  # each of them its own strides


def test_heads_in_the_second_or_third_dimension(device, path):
    q, k = torch.randn(2, 5, 3, 16, device=device), torch.randn(2, 5, 1, 16, device=device)
    cos, sin = angles(2, 5, 16, torch.float32, device)
    check(q, k, cos, sin, unsqueeze_dim=2)
    third = rotary(q, k, cos, sin, unsqueeze_dim=2)
    second = rotary(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    assert all(torch.equal(a, b.transpose(1, 2)) for a, b in zip(third, second, strict=True))


def test_more_heads_than_a_program_rotates_at_once(device, path, monkeypatch):
    monkeypatch.setattr(rotary_module, "_tile", lambda _: (16, 16))
    q, k = (token_major(2, n, 3, 16, torch.float32, device) for n in (5, 3))
    check(q, k, *angles(2, 3, 12, torch.float32, device))


@pytest.mark.parametrize("layout", ["token-major", "head-major", "slices of one projection", "strided columns"])
def test_any_strides_and_the_gradients_memory_layout(device, path, layout):
    if layout == "token-major":
        q, k = (token_major(2, n, 5, 16, torch.float32, device) for n in (3, 2))
    elif layout == "head-major":
        q, k = (torch.randn(2, n, 5, 16, device=device) for n in (3, 2))
    elif layout == "slices of one projection":  # Phi3's qkv
        qkv = torch.randn(2, 5, 7 * 16, device=device)
        q, k = qkv[..., :48].view(2, 5, 3, 16).transpose(1, 2), qkv[..., 48:80].view(2, 5, 2, 16).transpose(1, 2)
    else:
        q, k = (torch.randn(2, n, 5, 32, device=device)[..., ::2] for n in (3, 2))
    cos, sin = (torch.randn(5, 2, 16, device=device).transpose(0, 1) for _ in range(2))
    check(q, k, cos, sin)
    if path == "kernel":
        q.requires_grad_()
        q_out, k_out = rotary(q, k, cos, sin)
        assert q_out.stride() == torch.empty_like(q).stride()
        assert k_out.stride() == torch.empty_like(k).stride()
        (dq,) = torch.autograd.grad(q_out, q, torch.randn(q.shape, device=device))
        assert dq.stride() == q_out.stride()


def test_gradient_of_the_angles_where_they_need_one(device, path):
    q, k = (token_major(2, n, 3, 16, torch.float32, device) for n in (2, 1))
    cos, sin = (t.requires_grad_() for t in angles(2, 3, 16, torch.float32, device))
    results = [
        torch.autograd.grad([y.square().sum() for y in function(q, k, cos, sin)], (cos, sin))
        for function in (rotary, stock)
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_fp32_equals_transformers(device, path, name):
    modeling = pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    q, k = (token_major(2, n, 5, 32, torch.float32, device) for n in (4, 2))
    cos, sin = angles(2, 5, 32, torch.float32, device)
    for actual, expected in zip(rotary(q, k, cos, sin), modeling.apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_q_or_k_gets_no_gradient_work(device, frozen, monkeypatch):
    pytest.importorskip("triton")
    asked = []
    launch = rotary_module.launch
    monkeypatch.setattr(rotary_module, "launch", lambda *a, **options: asked.append(options) or launch(*a, **options))
    inputs = [torch.randn(1, 3 + i, 2, 8, device=device, requires_grad=i != frozen) for i in range(2)]
    q_out, k_out = rotary(*inputs, *angles(1, 2, 8, torch.float32, device))
    (q_out.sum() + k_out.sum()).backward()
    assert [(o["Q_HEADS"], o["K_HEADS"]) for o in asked] == [(3, 4), (4 - frozen * 1, 0)]
    assert inputs[frozen].grad is None


def test_one_output_unused(device, path):
    q, k = (token_major(2, n, 3, 16, torch.float32, device).requires_grad_() for n in (2, 1))
    q_out, _ = rotary(q, k, *angles(2, 3, 16, torch.float32, device))
    q_out.sum().backward()
    assert q.grad is not None
    assert k.grad is None or not k.grad.any()


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_q_and_k_of_different_dtypes_are_rotated_each_in_its_own(device, path, dtypes):
    """As under autocast, where an adapter of PEFT's on one of the projections returns fp32."""
    q, k = (torch.randn(2, heads, 3, 8, device=device).to(d) for heads, d in zip((4, 1), dtypes, strict=True))
    cos, sin = (torch.randn(1, 3, 8, device=device).bfloat16() for _ in range(2))
    alone = rotary_one(q, cos, sin), rotary_one(k, cos, sin)
    for got, expected, x in zip(rotary(q, k, cos, sin), alone, (q, k), strict=True):
        assert got.dtype == x.dtype
        assert torch.equal(got, expected)


Q, K, COS = torch.ones(2, 4, 3, 8), torch.ones(2, 1, 3, 8), torch.ones(1, 3, 8)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unsqueeze_dim": 0}, ValueError, "unsqueeze_dim must be 1 or 2, not 0"),
        ({"q": Q.long()}, TypeError, "q must have a floating-point dtype, not torch.int64"),
        ({"k": K.long()}, TypeError, "k must have a floating-point dtype, not torch.int64"),
        ({"sin": COS.double()}, TypeError, "sin has dtype torch.float64, expected cos's torch.float32"),
        ({"cos": COS.to("meta")}, ValueError, "cpu, meta and cpu, expected q's device cpu"),
        ({"q": Q[0]}, ValueError, r"q has shape \(4, 3, 8\), expected 4 dimensions"),
        ({"k": K[:, :, :2]}, ValueError, r"k has shape \(2, 1, 2, 8\), expected q's \(2, 4, 3, 8\)"),
        ({"unsqueeze_dim": 2}, ValueError, r"k has shape \(2, 1, 3, 8\), expected q's .* dimension 2"),
        ({"cos": COS[:, :2]}, ValueError, r"cos has shape \(1, 2, 8\), expected \(2 or 1, 3, R\)"),
        ({"cos": torch.ones(3, 3, 8)}, ValueError, r"cos has shape \(3, 3, 8\), expected \(2 or 1, 3, R\)"),
        ({"cos": COS[0]}, ValueError, r"cos has shape \(3, 8\)"),
        ({"cos": torch.ones(1, 3, 10)}, ValueError, "cos has 10 columns, expected an even number up to q's 8"),
        ({"cos": COS[..., :3]}, ValueError, "cos has 3 columns, expected an even number"),
        ({"sin": COS[..., :4]}, ValueError, r"sin has shape \(1, 3, 4\), expected cos's \(1, 3, 8\)"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        rotary(**({"q": Q, "k": K, "cos": COS, "sin": COS} | change))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("width", [16, 12])
def test_one_tensor_alone_is_rotated_as_it_is_beside_another(device, path, unsqueeze_dim, width):
    q = torch.randn(2, 3, 5, 16, device=device).transpose(1, 3 - unsqueeze_dim).requires_grad_()
    cos, sin = angles(2, q.shape[3 - unsqueeze_dim], width, torch.float32, device)
    (both, _), alone = rotary(q, q.detach(), cos, sin, unsqueeze_dim), rotary_one(q, cos, sin, unsqueeze_dim)
    assert torch.equal(alone, both)
    assert alone.stride() == both.stride()
    upstream = torch.randn_like(both)
    assert torch.equal(*(torch.autograd.grad(y, q, upstream)[0] for y in (alone, both)))


def test_one_tensor_alone_says_what_it_was_given(device):
    with pytest.raises(ValueError, match="expected 4 dimensions"):
        rotary_one(Q[0], COS, COS)
