"""What holds for every op, whatever it computes: each test runs over the table `OPS`. A new op is one entry more.

Over 300 lines: what every op must keep to is one list.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from liger.ops import add_rms_norm, geglu, launch, layer_norm, qk_norm_rotary, rms_norm, rotary, swiglu, swiglu_joined

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Op(NamedTuple):
    """A call of an op, and inputs for it that hold `batch` × `length` tokens."""

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: Callable[[int, int, torch.dtype, torch.device], tuple[Tensor, ...]]
    constants: tuple[int, ...] = ()
    """Positions of floating-point inputs that never take a gradient."""
    kept: tuple[int, ...] = ()
    """Positions of outputs that backward needs: one that was changed in place must be refused."""

    def leaves(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """The inputs that take a gradient."""
        return [t for i, t in enumerate(inputs) if t.is_floating_point() and i not in self.constants]

    def prepare(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Inputs that require their gradients."""
        inputs = self.inputs(batch, length, dtype, device)
        for leaf in self.leaves(inputs):
            leaf.requires_grad_()
        return inputs

    def outputs(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs, always as a tuple."""
        outputs = self.function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def rows(width: int, count: int, parameters: int = 0):
    """Inputs: `count` tensors (batch, length, width), then `parameters` vectors (width,)."""

    def inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        tensors = [torch.randn(batch, length, width, dtype=dtype, device=device) for _ in range(count)]
        return *tensors, *(torch.rand(width, dtype=dtype, device=device) for _ in range(parameters))

    return inputs


def heads(rotated: int, token_major: bool):
    """Inputs: q with 3 heads and k with 1, of 64 columns, and the cos and sin of `rotated` columns."""

    def inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        def head(count: int) -> Tensor:
            if token_major:
                return torch.randn(batch, length, count, 64, dtype=dtype, device=device).transpose(1, 2)
            return torch.randn(batch, count, length, 64, dtype=dtype, device=device)

        angles = torch.randn(1, length, rotated, dtype=torch.float32, device=device)
        return head(3), head(1), angles.cos().to(dtype), angles.sin().to(dtype)

    return inputs


def heads_and_weights(rotated: int, token_major: bool):
    """Inputs: the q and k of `heads`, their norms' weights, cos and sin."""

    def inputs(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        q, k, *angles = heads(rotated, token_major)(batch, length, dtype, device)
        return q, k, *(torch.rand(64, dtype=dtype, device=device) for _ in range(2)), *angles

    return inputs


OPS = {
    "rms_norm": Op(rms_norm, rows(64, 1, parameters=1)),
    "rms_norm-gemma": Op(lambda x, w: rms_norm(x, w, cast="gemma", offset=1.0), rows(64, 1, parameters=1)),
    "add_rms_norm": Op(add_rms_norm, rows(64, 2, parameters=1), kept=(1,)),
    "layer_norm": Op(layer_norm, rows(64, 1, parameters=2)),
    "layer_norm-no-bias": Op(layer_norm, rows(64, 1, parameters=1)),
    "swiglu": Op(swiglu, rows(96, 2)),
    "swiglu-halves": Op(lambda x: swiglu(*x.chunk(2, -1)), rows(96, 1)),
    "swiglu_joined": Op(swiglu_joined, rows(96, 1)),
    "geglu": Op(geglu, rows(96, 2)),
    "geglu-erf": Op(lambda gate, up: geglu(gate, up, "none"), rows(96, 2)),
    "rotary": Op(rotary, heads(64, token_major=True), constants=(2, 3)),
    "rotary-partial": Op(rotary, heads(16, token_major=False), constants=(2, 3)),
    "qk_norm_rotary": Op(
        lambda *inputs: qk_norm_rotary(*inputs, unsqueeze_dim=1), heads_and_weights(64, True), constants=(4, 5)
    ),
    "qk_norm_rotary-gemma-partial": Op(
        lambda *inputs: qk_norm_rotary(*inputs, unsqueeze_dim=1, cast="gemma", offset=1.0),
        heads_and_weights(16, False),
        constants=(4, 5),
    ),
}


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def gradients(op: Op, inputs: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(op.outputs(inputs), op.leaves(inputs), upstream)


def assert_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_inputs_and_upstream_stay_unchanged_through_two_backwards(op, device, path):
    """A producer may have saved its output, and a residual may share the upstream gradient."""
    inputs = op.prepare(2, 3, torch.float32, device)
    outputs = op.outputs(inputs)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    before = [t.detach().clone() for t in (*inputs, *outputs, *upstream)]
    first = torch.autograd.grad(outputs, op.leaves(inputs), upstream, retain_graph=True)
    kept = [t.clone() for t in first]
    second = torch.autograd.grad(outputs, op.leaves(inputs), upstream)
    assert_same([t.detach() for t in (*inputs, *outputs, *upstream)], before)
    assert_same(first, kept)
    assert_same(second, kept)


def test_gradient_through_a_producer_that_saved_its_output(op, device, path):
    inputs = op.prepare(2, 3, torch.float32, device)
    leaves = op.leaves(inputs)
    produced = tuple(t.exp() if any(t is leaf for leaf in leaves) else t for t in inputs)
    outputs = op.outputs(produced)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    through = torch.autograd.grad(outputs, leaves, upstream)
    plain = tuple(t.detach().requires_grad_(t.requires_grad) for t in produced)
    direct = gradients(op, plain, upstream)
    exps = [leaf.detach().exp() for leaf in leaves]
    assert_same(through, [d * e for d, e in zip(direct, exps, strict=True)])


def test_expanded_upstream_gradient_is_as_its_copy(op, device, path):
    inputs = op.prepare(2, 3, torch.float32, device)
    outputs = op.outputs(inputs)
    scalars = [torch.randn((), device=device) for _ in outputs]
    expanded = tuple(s.expand_as(y) for s, y in zip(scalars, outputs, strict=True))
    assert_same(gradients(op, inputs, expanded), gradients(op, inputs, tuple(t.contiguous() for t in expanded)))


def test_strided_inputs_are_as_their_copies(op, device, path):
    inputs = op.prepare(2, 3, torch.float32, device)
    strided = tuple(torch.stack((t, t.neg()), dim=-1)[..., 0].detach().requires_grad_(t.requires_grad) for t in inputs)
    assert not any(t.is_contiguous() for t in strided)
    outputs = op.outputs(inputs)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    torch.testing.assert_close(op.outputs(strided), outputs)
    torch.testing.assert_close(gradients(op, strided, upstream), gradients(op, inputs, upstream))


def test_each_frozen_input_gets_no_gradient_and_changes_no_other(op, device, path):
    inputs = op.prepare(2, 3, torch.float32, device)
    leaves = op.leaves(inputs)
    upstream = tuple(torch.randn_like(y) for y in op.outputs(inputs))
    full = gradients(op, inputs, upstream)
    for frozen in leaves if len(leaves) > 1 else []:
        frozen.requires_grad_(False)
        outputs = [(y, g) for y, g in zip(op.outputs(inputs), upstream, strict=True) if y.requires_grad]
        others = [(t, g) for t, g in zip(leaves, full, strict=True) if t is not frozen]
        torch.autograd.backward([y for y, _ in outputs], [g for _, g in outputs])
        assert frozen.grad is None
        # Close, not equal: without the frozen input's part, a GPU's compiler contracts other products and sums.
        torch.testing.assert_close([t.grad for t, _ in others], [g for _, g in others])
        for leaf in leaves:
            leaf.grad = None
        frozen.requires_grad_()


def test_without_gradients_the_same_result(op, device, path):
    inputs = op.prepare(2, 3, torch.bfloat16, device)
    with torch.no_grad():
        quiet = op.outputs(inputs)
    assert not any(y.requires_grad for y in quiet)
    assert_same(quiet, op.outputs(inputs))


def test_outputs_are_no_views_and_may_be_changed_in_place(op, device, path):
    """Nothing that backward needs is the caller's to overwrite."""
    inputs = op.prepare(2, 3, torch.float32, device)
    outputs = op.outputs(inputs)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    expected = gradients(op, inputs, upstream)
    storages = {t.untyped_storage().data_ptr() for t in inputs}
    assert not any(y.untyped_storage().data_ptr() in storages for y in outputs)
    if path == "kernel":
        for i, y in enumerate(outputs):
            if i not in op.kept:
                y.detach().zero_()
        assert_same(torch.autograd.grad(outputs, op.leaves(inputs), upstream, retain_graph=True), expected)
        for i in op.kept:
            outputs[i].detach().zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(outputs, op.leaves(inputs), upstream, retain_graph=True)


def test_no_tokens(op, device, path):
    inputs = op.prepare(0, 3, torch.float32, device)
    outputs = op.outputs(inputs)
    for leaf, gradient in zip(
        op.leaves(inputs), gradients(op, inputs, tuple(torch.ones_like(y) for y in outputs)), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@pytest.mark.parametrize("strided", [False, True])
def test_second_derivative_is_refused_not_wrong(op, device, path, strided):
    if path == "reference":
        pytest.skip("torch differentiates the reference as often as asked")
    inputs = op.prepare(2, 3, torch.float32, device)
    if strided:  # an op that copies what it reads must not lose the way to it
        inputs = tuple(
            t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(t.requires_grad) for t in inputs
        )  # fmt: skip
    for upstream in (Tensor.sum, lambda y: y.square().sum()):  # a constant, and one with a graph
        if op.function is rotary and upstream is Tensor.sum:
            continue  # it is linear
        loss = sum(map(upstream, op.outputs(inputs)))
        x = op.leaves(inputs)[0]
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(loss + dx.square().sum(), x)  # goes only where the way to x leads


@pytest.mark.parametrize("number", ["eps", "offset"])
def test_a_learned_number_is_refused_not_frozen(device, path, number):
    x, learned = torch.randn(2, 8, device=device), torch.tensor(0.1, requires_grad=True)
    q = torch.randn(2, 1, 3, 8, device=device)
    calls = [lambda **n: rms_norm(x, **n), lambda **n: add_rms_norm(x, x, None, **n)]
    calls += [lambda **n: qk_norm_rotary(q, q, None, None, q[:, :, 0], q[:, :, 0], **n)]
    calls += [lambda **n: layer_norm(x, **n)] if number == "eps" else []
    for call in calls:
        call(**{number: learned.detach()})
        with pytest.raises(ValueError, match=f"{number} requires a gradient"):
            call(**{number: learned})


def test_make_fx_sees_torch_operations(op, device, monkeypatch):
    inputs = op.inputs(2, 3, torch.float32, device)
    graphs = []
    for enabled in (True, False):
        monkeypatch.setattr(launch, "enabled", enabled)
        graphs.append(make_fx(lambda *inputs: op.outputs(inputs))(*inputs).graph)
    with_kernels, without = ([node.target for node in graph.nodes] for graph in graphs)
    assert with_kernels == without


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_transforms_and_traces_see_torch_operations(op, device, monkeypatch):
    inputs = op.inputs(2, 3, torch.float32, device)
    at = tuple(i for i, t in enumerate(inputs) if any(t is leaf for leaf in op.leaves(inputs)))

    def loss(*inputs: Tensor) -> Tensor:
        return torch.stack([y.square().mean() for y in op.outputs(inputs)]).sum()

    def seen() -> list[Tensor]:
        _, forward = torch.func.jvp(loss, inputs, tuple(map(torch.ones_like, inputs)))
        traced = torch.jit.trace(lambda *inputs: op.outputs(inputs), inputs)
        return [*torch.func.grad(loss, at)(*inputs), forward, *traced(*inputs)]

    through_kernels = seen()
    monkeypatch.setattr(launch, "enabled", False)
    assert_same(through_kernels, seen())


@pytest.mark.gpu
def test_past_two_to_the_31_elements(op, device):
    """The last tokens equal the same tokens computed alone: no offset wrapped around 32 bits."""
    torch.use_deterministic_algorithms(False)  # poisoning tens of GB says nothing here
    per_token = max(t.numel() for t in op.inputs(1, 1, torch.bfloat16, device))
    length = 2**31 // per_token + 5

    def tail(t: Tensor) -> Tensor:
        return t.narrow(t.shape.index(length), length - 3, 3) if length in t.shape else t

    inputs = op.prepare(1, length, torch.bfloat16, device)
    outputs = op.outputs(inputs)
    upstream = tuple(torch.randn_like(y) for y in outputs)
    whole = [*outputs, *torch.autograd.grad(outputs, op.leaves(inputs), upstream)]
    alone = tuple(tail(t).detach().clone().requires_grad_(t.requires_grad) for t in inputs)
    expected = [*op.outputs(alone), *gradients(op, alone, tuple(tail(g) for g in upstream))]
    compared = [(tail(a), b) for a, b in zip(whole, expected, strict=True) if length in a.shape]
    assert len(compared) >= 2
    for actual, one in compared:
        torch.testing.assert_close(actual, one)


@pytest.mark.gpu
def test_on_a_device_that_is_not_current(op):
    """Triton launches on the current device: the tensors' own must be made current."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first = op.prepare(2, 3, torch.bfloat16, torch.device("cuda:0"))
    second = tuple(t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in first)
    assert torch.cuda.current_device() == 0
    upstream = tuple(torch.randn_like(y) for y in op.outputs(first))
    on_second = [*op.outputs(second), *gradients(op, second, tuple(g.to("cuda:1") for g in upstream))]
    torch.cuda.synchronize("cuda:1")
    assert all(t.device.index == 1 for t in on_second)
    assert_same([t.to("cuda:0") for t in on_second], [*op.outputs(first), *gradients(op, first, upstream)])


@pytest.mark.gpu
def test_compiles_without_a_graph_break(op, device):
    torch._dynamo.reset()
    compiled = op._replace(function=torch.compile(op.function, fullgraph=True))
    for batch, length in ((2, 16), (3, 40)):  # the second has dynamic shapes
        inputs = op.prepare(batch, length, torch.bfloat16, device)
        upstream = tuple(torch.randn_like(y) for y in op.outputs(inputs))
        expected = [*op.outputs(inputs), *gradients(op, inputs, upstream)]
        actual = [*compiled.outputs(inputs), *gradients(compiled, inputs, upstream)]
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b)


def compiled_variants() -> dict[str, int]:
    """How many compiled variants Triton holds of each of the ops' kernels."""
    return {
        f"{name}.{attribute}": sum(len(caches[0]) for caches in value.device_caches.values())
        for name, module in list(sys.modules.items())
        if name.startswith("liger.ops.")
        for attribute, value in vars(module).items()
        if isinstance(value, launch.triton.JITFunction)
    }


@pytest.mark.gpu
def test_new_batch_sizes_and_lengths_compile_nothing(op, device):
    chance = random.Random(0)
    sizes = [(2, 16), (3, 33), *((chance.randint(1, 9), chance.randint(1, 300)) for _ in range(50)), (1, 1)]

    def run(batch: int, length: int) -> None:
        inputs = op.prepare(batch, length, torch.bfloat16, device)
        gradients(op, inputs, tuple(torch.ones_like(y) for y in op.outputs(inputs)))

    for size in sizes[:2]:
        run(*size)
    before = compiled_variants()
    assert sum(before.values()) >= 2, "the count does not see Triton's cache"
    for size in sizes[2:]:
        run(*size)
    assert compiled_variants() == before


@pytest.mark.gpu
def test_host_never_waits_for_the_gpu(op, device):
    inputs = op.prepare(2, 16, torch.bfloat16, device)
    upstream = tuple(torch.randn_like(y) for y in op.outputs(inputs))
    gradients(op, inputs, upstream)  # compile first
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(op, inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
