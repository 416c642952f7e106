"""Real processes, gloo on CPUs and NCCL on GPUs: the loss, and every rank's gradients, under what shares out a model.

The cases stand in the files beside this one; all that are asked for run in one pair of processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pair import PASSED, SKIPPED, cases, outcomes

NCCL = [
    "ddp, applied before",
    "fsdp2, layers, applied before",
    "fsdp2, head of its own, applied after",
    "fsdp2, bf16, head of its own",
    "logits before backward, fsdp2, head of its own",
    "op, kernel, float32, mean",
    "op, kernel, bfloat16, softcap",
    "tensor parallel, whole logits, applied after",
    "accelerate, fsdp2, applied before",
    "trainer, fsdp2",
]
"""What runs on GPUs: one strategy of each kind, and the kernels as they are compiled."""


def shared(request, tmp_path_factory, device, world):
    """The outcomes of the cases that pytest has selected; the first of xdist's workers that asks runs them."""
    fixture = f"on_{device}_{world}"
    names = [i.callspec.params["name"] for i in request.session.items if fixture in getattr(i, "fixturenames", ())]
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / fixture
    result = folder / "result.json"
    try:
        folder.mkdir()
    except FileExistsError:
        while not result.exists():
            time.sleep(0.2)
    else:
        try:
            found = outcomes(names, folder, device, world)
        except BaseException as error:
            found = {name: [repr(error)] for name in names}
            raise
        finally:
            (folder / "unfinished").write_text(json.dumps(found))
            (folder / "unfinished").rename(result)
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def on_cpu_2(request, tmp_path_factory):
    return shared(request, tmp_path_factory, "cpu", 2)


@pytest.fixture(scope="module")
def on_cuda_1(request, tmp_path_factory):
    return shared(request, tmp_path_factory, "cuda", 1)


@pytest.fixture(scope="module")
def on_cuda_2(request, tmp_path_factory):
    return shared(request, tmp_path_factory, "cuda", 2)


def check(ended):
    for rank, outcome in enumerate(ended):
        if outcome.startswith(SKIPPED):
            pytest.skip(outcome.removeprefix(SKIPPED))
        assert outcome == PASSED, f"rank {rank}:\n{outcome}"


@pytest.mark.parametrize("name", cases())
def test_two_processes(on_cpu_2, name):
    check(on_cpu_2[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NCCL)
def test_nccl_on_one_gpu(on_cuda_1, name):
    check(on_cuda_1[name])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU for each of two processes")
@pytest.mark.parametrize("name", NCCL)
def test_nccl_on_two_gpus(on_cuda_2, name):
    check(on_cuda_2[name])


def test_one_command_runs_the_cases_in_any_number_of_processes():
    script = Path(__file__).parent / "on_gpus.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = [*torchrun, str(script), "op,", "same bits"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == [
        "op, same bits on every rank: passed",
        "1 cases in 3 processes on cpu, 0 failed",
    ]
