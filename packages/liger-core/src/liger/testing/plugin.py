"""The pytest plugin of this project's tests and of every adapter's: `addopts = "-p liger.testing.plugin"`.

Loaded before any test is collected, because Triton decides at a kernel's definition whether it is interpreted.

Fixtures: `device`, the GPU where there is one; `path`, which runs a test twice, through the kernels and through the
references; `no_interpreter`, for what does not depend on the kernels: without a GPU the references run, in a fraction
of the time; `poisoned_memory`, under which memory that nothing wrote reads as NaN. Every test is seeded.
Marker: `gpu`, for what only a GPU can show; skipped elsewhere, and counted in the closing lines.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
# Not in other programs that import this, nor too late: Triton's own functions were defined when it was imported.
if not HAS_GPU and "PYTEST_VERSION" in os.environ and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")


def round_bfloat16_in_the_interpreter() -> None:
    """Make Triton's interpreter round fp32 to bf16 as every GPU does: it truncates, twice the error of rounding."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # no Triton on this platform: the tests run the references only
        return
    convert = interpreter._convert_float

    def convert_rounding(data: Any, source: tl.dtype, target: tl.dtype, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            return torch.tensor(data, dtype=torch.float32).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(data, source, target, rounding_mode)

    interpreter._convert_float = convert_rounding


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and repair the interpreter's rounding where it will run."""
    if not HAS_GPU:
        round_bfloat16_in_the_interpreter()
    config.addinivalue_line("markers", "gpu: needs a GPU; skipped without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note whose contract a test is of; skip the tests that need a GPU where there is none."""
    for item in items:
        adapter = getattr(getattr(item, "cls", None), "adapter", None)
        item.user_properties += [] if adapter is None else [("adapter", adapter.key)]
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which adapters fail and where, where the kernels ran, and how many tests a GPU would have added."""
    for line in broken_adapters([*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]):
        terminalreporter.write_line(line)
    skipped = [r for r in terminalreporter.getreports("skipped") if "needs a GPU" in str(r.longrepr)]
    where = torch.cuda.get_device_name() if HAS_GPU else "the CPU, kernels in Triton's interpreter"
    terminalreporter.write_line(f"ran on {where}; {len(skipped)} tests skipped that need a GPU")


def broken_adapters(reports: list[pytest.TestReport]) -> Iterator[str]:
    """A paragraph for each adapter whose contract fails: the tests, each with the first line of its error."""
    found: dict[str, list[str]] = {}
    for report in reports:
        crash = getattr(report.longrepr, "reprcrash", None)
        error = crash.message if crash else str(report.longrepr)
        for name, key in getattr(report, "user_properties", []):
            if name == "adapter":
                test = report.nodeid.rpartition("::")[2]
                found.setdefault(str(key), []).append(f"  {test}: {error.strip().partition(chr(10))[0]}")
    for key, lines in sorted(found.items()):
        yield f"adapter {key} on transformers {importlib.metadata.version('transformers')}: {len(lines)} tests fail"
        yield from lines


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random inputs in every run, whatever ran before; others with another `LIGER_SEED`."""
    torch.manual_seed(int(os.environ.get("LIGER_SEED", "0")))


@pytest.fixture(autouse=True)
def _gpu_memory_given_back() -> Iterator[None]:
    """Gigabytes that torch keeps for later go back to the GPU, which a process for each core may share."""
    yield
    if HAS_GPU and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _kernels_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, small inputs go to torch's own code: not in tests, which are about the kernels."""
    if HAS_GPU:
        importlib.import_module("liger.ops")
        monkeypatch.setattr(sys.modules["liger.ops.linear_cross_entropy"], "FEW_LOGITS", 0)
        monkeypatch.setattr(sys.modules["liger.ops.layer_norm"], "FEW_ELEMENTS", 0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["kernel", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test through the Triton kernels (interpreted without a GPU), then through the references."""
    from liger.ops import launch

    if request.param == "kernel" and launch.triton is None:
        pytest.skip("there is no Triton on this platform")
    # Or both halves of the test would run the reference, and pass.
    assert HAS_GPU or launch.INTERPRETED, "Triton was imported before this plugin could ask for its interpreter"
    monkeypatch.setattr(launch, "enabled", request.param == "kernel")
    return str(request.param)


@pytest.fixture
def no_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the references where there is no GPU, unless the test asks for `path`."""
    from liger.ops import launch

    if not HAS_GPU and "path" not in request.fixturenames:
        monkeypatch.setattr(launch, "enabled", False)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element that no kernel wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills uninitialised memory under this switch
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
