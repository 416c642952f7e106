"""Lazy logits: a tensor to all who ask, computed once, when somebody first reads it.

Over 300 lines: a class has one file of tests.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import weakref

import pytest
import torch
from torch.utils._pytree import tree_map

from liger.lazy_logits import LazyLogits


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@pytest.fixture
def made():
    """(lazy, the list of times it was computed, the leaf that the values depend on)."""
    leaf = torch.arange(6.0).view(2, 3).requires_grad_()
    calls = []

    def compute():
        calls.append(1)
        with torch.enable_grad():
            return leaf * 2

    def detached():
        calls.append(1)
        return leaf.detach() * 2

    return LazyLogits(compute, torch.Size((2, 3)), torch.float32, torch.device("cpu"), detached), calls, leaf


def test_metadata_and_unasked_conversions_compute_nothing(made):
    lazy, calls, _ = made
    assert isinstance(lazy, torch.Tensor)
    assert torch.is_tensor(lazy)
    assert lazy.shape == (2, 3)
    assert lazy.size(-1) == 3
    assert (lazy.ndim, lazy.dim(), lazy.numel(), lazy.dtype) == (2, 2, 6, torch.float32)
    assert lazy.device.type == "cpu"
    assert (len(lazy), lazy.stride(), lazy.is_contiguous()) == (2, (3, 1), True)
    assert lazy.bfloat16().dtype == torch.bfloat16
    assert lazy.detach().float().shape == (2, 3)
    assert lazy.clone().dtype == torch.float32
    assert "LazyLogits(shape=(2, 3)" in repr(lazy)
    assert torch.is_floating_point(lazy)
    assert lazy in {lazy: 1}
    assert not calls


def test_wrappers_that_walk_over_outputs_compute_nothing(made):
    """DDP looks for grad_fn, FSDP hooks what requires gradients; there is no graph yet that they could hook into."""
    lazy, calls, _ = made
    assert not lazy.requires_grad
    assert lazy.grad_fn is None
    assert lazy.is_leaf
    for walked in tree_map(lambda t: t.to(torch.bfloat16), {"logits": [lazy]})["logits"]:
        assert isinstance(walked, LazyLogits)
    assert not calls
    lazy + 0
    assert lazy.requires_grad  # now there is
    assert lazy.grad_fn is not None


@pytest.mark.parametrize(
    "args", [("cpu",), (torch.bfloat16,), ("cpu", torch.half, True), (torch.device("cpu"), torch.double)], ids=str
)
def test_a_move_stays_lazy(made, args):
    lazy, calls, leaf = made
    moved, expected = lazy.to(*args), (leaf * 2).to(*args)
    assert (moved.dtype, moved.device, moved.shape) == (expected.dtype, expected.device, expected.shape)
    assert not calls
    assert torch.equal(moved + 0, expected)
    assert lazy.to(device="cpu", dtype=torch.half, non_blocking=True).dtype == torch.half


def test_conversions_are_those_of_the_values(made):
    lazy, _, leaf = made
    assert torch.equal(lazy.bfloat16() + 0, (leaf * 2).bfloat16())
    assert lazy.half().half().float().sum().dtype == torch.float32
    assert not (lazy.detach() + 0).requires_grad


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x + 0,
        lambda x: torch.softmax(x, -1),
        lambda x: x[..., :-1, :],
        lambda x: x.argmax(-1),
        lambda x: torch.nn.functional.cross_entropy(x, torch.tensor([0, 2])),
        lambda x: torch.cat([x, x]),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.detach().numpy().tolist(),
        lambda x: copy.deepcopy(x.detach()),
        lambda x: pickle.loads(pickle.dumps(x.detach())),
        lambda x: x.to(torch.empty(0, dtype=torch.float64)),
        lambda x: x.contiguous(),
        lambda x: x.masked_fill(x > 3, 0.0),
        lambda x: x.max().item(),
        lambda x: [row.sum().item() for row in x],
        lambda x: saved_and_loaded({"logits": x.detach()})["logits"],
    ],
)
def test_every_use_sees_the_values(made, use):
    lazy, calls, leaf = made
    result, expected = use(lazy), use(leaf * 2)
    if isinstance(expected, torch.Tensor):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)
    else:
        assert result == expected
    use(lazy)
    assert len(calls) == 1


def test_once_read_they_hold_nothing_but_the_values(made):
    _, _, leaf = made
    compute = functools.partial(torch.add, leaf, 1)  # holds the hidden states and their graph
    lazy, held = LazyLogits(compute, leaf.shape, leaf.dtype, leaf.device), weakref.ref(compute)
    del compute
    assert held() is not None
    lazy + 0
    assert held() is None


@pytest.mark.parametrize(
    "detached", [torch.Tensor.detach, lambda x: x.float().detach(), lambda x: x.detach().float()], ids=range(3)
)
def test_what_is_detached_holds_no_graph_and_outlives_it(detached):
    leaf = torch.arange(6.0).view(2, 3).requires_grad_()
    compute = functools.partial(torch.mul, leaf, 2)  # holds the hidden states and their graph
    lazy = LazyLogits(compute, leaf.shape, leaf.dtype, leaf.device, lambda: leaf.detach() * 2)
    kept, graph = detached(lazy), weakref.ref(compute)
    del compute, lazy
    assert graph() is None
    assert torch.equal(kept + 0, leaf.detach() * 2)


def test_gradients_reach_what_the_logits_came_from(made):
    lazy, _, leaf = made
    lazy.square().sum().backward()
    assert torch.equal(leaf.grad, 8 * leaf.detach())


def test_a_conversion_first_read_without_gradients_still_has_them(made):
    lazy, _, _ = made
    converted = lazy.float()
    with torch.no_grad():
        converted.argmax(-1)
        unneeded = lazy.bfloat16()
    assert (converted + 0).requires_grad
    assert not (unneeded + 0).requires_grad


def test_a_conversion_does_not_see_a_later_change_in_place(made):
    lazy, _, _ = made
    before = lazy.bfloat16()
    lazy.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place before a conversion"):
        before + 0
    assert torch.equal(lazy.bfloat16() + 0, torch.arange(6.0).view(2, 3).bfloat16() * 4)


def test_an_autograd_function_that_takes_them_unread_raises_instead_of_dropping_the_gradient(made):
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, grad):
            return grad

    lazy, _, leaf = made
    with pytest.raises(RuntimeError, match=r"give it outputs.logits \+ 0"):
        Exp.apply(lazy).sum().backward()
    Exp.apply(lazy + 0).sum().backward()
    assert leaf.grad is not None


class Detaches(torch.autograd.Function):
    """As DeepSpeed's do."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class HandsOn(torch.autograd.Function):
    """As torch's of a full backward hook does."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.mark_non_differentiable(*(t for t in (x, y) if not t.requires_grad))
        return x, y

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


class Clones(Detaches):
    @staticmethod
    def forward(ctx, x):
        return x.clone()


def hooked(x):
    return HandsOn.apply(x, torch.ones(1, requires_grad=True))[0]


CUTS = {
    "detached": Detaches.apply,
    "cloned": Clones.apply,
    "hooked": hooked,
    "hooked twice": lambda x: hooked(hooked(x)),
    "detached, hooked": lambda x: hooked(Detaches.apply(x)),
    "cloned, hooked": lambda x: hooked(Clones.apply(x)),
}


@pytest.mark.parametrize("looked", [None, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("cut_off", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("read", [lambda x: x + 0, lambda x: x.double(), lambda x: x.clone(), lambda x: x.float()])
def test_a_gradient_that_would_be_lost_is_refused(made, cut_off, read, looked):
    lazy, _, leaf = made
    logits, expected = cut_off(lazy), torch.arange(6.0).view(2, 3) * 2
    if looked is not None:
        with looked():
            assert torch.equal(logits.detach() + 0, expected)
            assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    values = read(logits)
    assert torch.equal(values.argmax(-1), expected.argmax(-1))
    assert torch.equal(values.detach().float(), expected)
    with pytest.raises(RuntimeError, match="went through an autograd Function before they were read"):
        (values * 2).sum().backward()
    assert leaf.grad is None
    with torch.no_grad():
        assert not read(cut_off(lazy)).requires_grad


def test_lost_logits_of_which_no_gradient_comes_back_raise_nothing(made):
    """As where DDP passes every output through a Function, or a loss of others is all that is differentiated."""

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x.clone(), y.clone()

        @staticmethod
        def backward(ctx, gradient, _):
            return gradient, None

    lazy, _, leaf = made
    First.apply(leaf * 1, hooked(lazy) + 0)[0].sum().backward()
    assert torch.equal(leaf.grad, torch.ones(2, 3))


def test_a_look_under_inference_mode_takes_no_gradient_away(made):
    lazy, _, leaf = made
    converted = lazy.double()
    with torch.inference_mode():
        converted.argmax(-1)
    converted.sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("read_before", [False, True])
@pytest.mark.parametrize("function", [lambda x: x.float().square().mean(), lambda x: x.log_softmax(-1)[:, 0].sum()])
def test_compiled_code_takes_them(made, function, read_before):
    lazy, _, leaf = made
    if read_before:
        lazy + 0
    torch._dynamo.reset()
    torch.compile(function, backend="eager")(lazy).backward()
    (expected,) = torch.autograd.grad(function(leaf * 2), leaf)
    torch.testing.assert_close(leaf.grad, expected)


def test_the_dispatcher_is_a_second_net(made):
    """What passes by torch functions (C++ callers, autograd Functions) still meets values, not an empty shell."""
    lazy, calls, _ = made
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.ops.aten.add.Tensor(lazy, 1), torch.arange(6.0).view(2, 3) * 2 + 1)
    assert calls


def test_a_gradient_that_the_loss_never_gives_is_refused(made):
    lazy, _, leaf = made
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no gradient of it reaches them"):
            lazy.retain_grad()
        lazy + 0
    own = lazy + 0
    own.retain_grad()
    own.sum().backward()
    assert torch.equal(own.grad, torch.ones(2, 3))
    assert torch.equal(leaf.grad, torch.full((2, 3), 2.0))


def test_a_hook_is_told_what_it_sees(made):
    lazy, _, _ = made
    seen = []
    with pytest.warns(UserWarning, match=r"computed without outputs\.logits"):
        lazy.register_hook(seen.append)
    (lazy * 3).sum().backward()
    assert torch.equal(seen[0], torch.full((2, 3), 3.0))
