"""How a kernel is started: on its tensor's device, and again through the variant that Triton chose before."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from liger.ops import launch as module
from liger.ops import rms_norm, swiglu

NAMES = ["x", "rows", "columns", "eps", "BLOCK"]


class Kernel:
    """Stands for a jitted kernel: its launches return a variant that says when it is started directly."""

    __name__ = "kernel"
    arg_names = NAMES

    def __init__(self, restartable=True):
        self.asked, self.restarted = 0, []
        self.restartable = restartable

    def __getitem__(self, grid):
        def start(*args, num_warps, **constexprs):
            self.asked += 1
            return Variant(self) if self.restartable else object()

        return start


class Variant:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *args: self.kernel.restarted.append((grid, args))


@pytest.fixture
def make(monkeypatch):
    """Makes kernels that `launch` knows, for this test only."""
    monkeypatch.setattr(module, "_variants", {})
    monkeypatch.setattr(module, "_varying", {})

    def make(**options):
        kernel = Kernel(**options)
        module._varying[id(kernel)] = (NAMES.index("rows"),)
        return kernel

    return make


X = torch.zeros(64)


def start(kernel, x=X, rows=3, columns=8, eps=1e-6, device=0, warps=4, grid=5, **constexprs):
    module._launch_here(kernel, (grid,), device, warps, (x, rows, columns, eps), constexprs or {"BLOCK": 16})


def test_the_same_launch_goes_straight_to_the_variant_with_every_argument_in_order(make):
    kernel, other = make(), torch.ones(64)
    start(kernel)
    start(kernel, x=other, rows=5, grid=7)
    assert kernel.asked == 1
    assert kernel.restarted == [((7, 1, 1), (other.data_ptr(), 5, 8, 1e-6, 16))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": X.to(torch.bfloat16)},
        {"x": X[1:]},  # not aligned to 16 bytes
        {"x": None},
        {"columns": 16},
        {"rows": 2**31},
        {"eps": None},
        {"eps": 1e-5},
        {"device": 1},
        {"warps": 8},
        {"BLOCK": 32},
    ],
    ids=str,
)
def test_what_triton_may_specialise_on_is_asked_of_triton(make, other):
    kernel = make()
    start(kernel)
    start(kernel, **other)
    assert (kernel.asked, kernel.restarted) == (2, [])


@pytest.mark.parametrize("other", [{"rows": 1}, {"rows": 4096}, {"x": torch.ones(7)}], ids=str)
def test_what_it_does_not_specialise_on_is_not(make, other):
    kernel = make()
    start(kernel)
    start(kernel, **other)
    assert (kernel.asked, len(kernel.restarted)) == (1, 1)


@pytest.mark.parametrize("is_rocm", [False, True])
def test_a_tensor_of_2_gib_is_another_variant_where_triton_counts_in_32_bits(make, monkeypatch, is_rocm):
    monkeypatch.setattr(module, "_IS_ROCM", is_rocm)
    kernel = make()
    small, large = (torch.empty(size // 4) for size in (2**31 - 4, 2**31))
    for x in (small, large, large):
        start(kernel, x=x)
    assert kernel.asked == (2 if is_rocm else 1)


def test_a_program_has_no_more_warps_than_threads_allow(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WARPS", 16)
    warps = []

    class Started:
        def __getitem__(self, grid):
            return lambda *args, num_warps: warps.append(num_warps)

    monkeypatch.setattr(module, "INTERPRETED", True)
    for wanted in (4, 16, 32):
        module.launch(Started(), (1,), X, num_warps=wanted)
    assert warps == [4, 16, 16]


def test_two_kernels_do_not_share_variants(make):
    one, other = make(), make()
    start(one)
    start(other)
    assert (one.asked, other.asked) == (1, 1)


def test_a_launch_that_returns_nothing_to_start_again_is_made_each_time(make):
    kernel = make(restartable=False)
    for _ in range(3):
        start(kernel)
    assert kernel.asked == 3


def test_constexprs_out_of_order_are_refused(make, monkeypatch):
    monkeypatch.setattr(Kernel, "arg_names", [*NAMES, "STAGES"])
    with pytest.raises(TypeError, match=r"constexprs \['STAGES', 'BLOCK'\], expected \['BLOCK', 'STAGES'\]"):
        start(make(), STAGES=3, BLOCK=16)


def test_a_tensor_after_a_number_is_refused(make):
    """Its address and dtype would not be looked at."""
    with pytest.raises(TypeError, match="kernel: a tensor comes after rows, which is a number"):
        start(make(), eps=X)


def test_misaligned_addresses_of_different_tensors_are_different(make, monkeypatch):
    monkeypatch.setattr(Kernel, "arg_names", ["x", "y", "BLOCK"])
    kernel = make()
    module._varying[id(kernel)] = ()
    for pair in ((X, X[1:]), (X[1:], X), (X[1:], X[1:]), (X, X)):
        module._launch_here(kernel, (1,), 0, 4, pair, {"BLOCK": 16})
    assert (kernel.asked, kernel.restarted) == (4, [])


def test_variants_are_forgotten_before_they_fill_the_memory(make, monkeypatch):
    monkeypatch.setattr(module, "_MOST_VARIANTS", 4)
    kernel = make()
    for columns in range(10):
        start(kernel, columns=columns)
    assert len(module._variants) <= 4


def test_a_tensor_subclass_takes_the_reference(device):
    class Sub(torch.Tensor):
        pass

    assert module.runs_kernels(torch.ones(1, device=device))
    assert not module.runs_kernels(torch.ones(1, device=device).as_subclass(Sub))
    assert not module.runs_kernels(torch.ones(1, device=device, dtype=torch.float64))
    assert module.runs_kernels(torch.ones(1, device=device), None, torch.ones(1, device=device, dtype=torch.bfloat16))
    assert not module.runs_kernels(torch.ones(1, device=device), None, torch.ones(1, device=device).as_subclass(Sub))


def test_a_weight_whose_memory_is_not_what_its_shape_says_keeps_the_kernel_away(device, monkeypatch):
    """A sharded or quantised weight beside a plain input: a kernel would read beyond what it holds."""

    class Sub(torch.Tensor):
        pass

    x, weight = torch.randn(3, 8, device=device), torch.rand(8, device=device)
    expected = rms_norm(x, weight)
    monkeypatch.setattr(
        importlib.import_module("liger.ops.rms_norm"), "launch", lambda *_, **__: pytest.fail("started")
    )
    torch.testing.assert_close(rms_norm(x, weight.as_subclass(Sub)).as_subclass(torch.Tensor), expected)


@pytest.mark.gpu
def test_a_real_kernel_started_again_with_other_tensors_alignments_and_dtypes(device):
    """What a wrong key would start is a kernel for another dtype, or one that reads 16 bytes where 2 are aligned."""
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        for offset in (0, 1, 0, 3):
            x = torch.randn(4 * 64 + offset, device=device, dtype=dtype)[offset:].view(4, 64)
            torch.testing.assert_close(rms_norm(x), rms_norm(x.clone()))
            torch.testing.assert_close(swiglu(x, x), swiglu(x.clone(), x.clone()))


def test_a_torch_without_what_tells_who_follows_is_asked_nothing(monkeypatch):
    for name in ("_are_functorch_transforms_active", "_get_dispatch_mode", "_TorchDispatchModeKey"):
        monkeypatch.delattr(torch._C, name)
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    spec = importlib.util.find_spec("liger.ops.launch")
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    assert not another.is_seen_through()
