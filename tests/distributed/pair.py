"""Two processes on one machine that run the same cases together, and say of each how it ended.

A test asks for `outcomes`; run as a script, this file is one of the processes, and on_gpus.py has torchrun start as
many as there are GPUs. On CPUs they talk through gloo, on GPUs,
one each, through NCCL. A case that fails in one of them closes its connections, so that it fails in the other too and
nobody waits; the next case has new ones.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from unittest import SkipTest

import pytest

MODULES = (
    *("data_parallel", "hand_written", "trainers", "logits_read", "context_parallel", "vocab_parallel"),
    "tensor_parallel",
)
PASSED, SKIPPED = "passed", "skipped: "
WORLD = int(os.environ.get("WORLD_SIZE", "2"))
RANK = int(os.environ.get("RANK", "0"))
DEVICE = os.environ.get("CASES_DEVICE", "cpu")
_LONGEST_WAIT = timedelta(seconds=60)  # of one process for the other
_LIMIT = 400  # seconds, for all cases

Case = Callable[[], None]


def cases() -> dict[str, Case]:
    """Every case by its name."""
    return {name: case for module in MODULES for name, case in importlib.import_module(module).CASES.items()}


def outcomes(names: Iterable[str], folder: Path, device: str = "cpu", world: int = 2) -> dict[str, list[str]]:
    """Run the named cases: for each, how it ended in every process (PASSED, SKIPPED and why, or a traceback)."""
    names, processes = list(names), []
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    environment = {**os.environ, **size, "OMP_NUM_THREADS": "1", "CASES_DEVICE": device}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with (folder / f"log{rank}").open("w") as log:
            command = [sys.executable, __file__, str(folder), *names]
            processes.append(subprocess.Popen(command, env=environment | ranks, stdout=log, stderr=log))
    try:
        for process in processes:
            process.wait(_LIMIT)
    except subprocess.TimeoutExpired:
        pass  # the cases that ended are told; of the others it is said below that they did not
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"log{rank}").read_text()[-3000:] for rank in range(world))
    return {name: told(folder, name, world, f"did not end\n{logs}") for name in names}


def told(folder: Path, name: str, world: int, otherwise: str) -> list[str]:
    """How a case ended in every process."""
    paths = [folder / f"outcomes{rank}" for rank in range(world)]
    ended = [dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {} for path in paths]
    return [of_rank.get(name, otherwise) for of_rank in ended]


def run(folder: Path, names: list[str]) -> None:
    """Run the cases as one of the processes; how each ended is written to the folder that all of them share."""
    import torch
    import torch.distributed as dist

    if DEVICE == "cuda":
        torch.cuda.set_device(RANK)
    else:
        from liger.testing.plugin import round_bfloat16_in_the_interpreter

        round_bfloat16_in_the_interpreter()
    known = cases()
    store = dist.FileStore(str(folder / "store"), WORLD)
    _connect(folder, "first")
    with (folder / f"outcomes{RANK}").open("w") as file:
        for name in names:
            torch.manual_seed(0)
            outcome = _outcome(known[name])
            if not is_fine(outcome):
                dist.destroy_process_group()
            print(json.dumps([name, outcome]), file=file, flush=True)
            store.set(f"{name}{RANK}", outcome)
            if not all(is_fine(store.get(f"{name}{rank}").decode()) for rank in range(WORLD)):
                if dist.is_initialized():
                    dist.destroy_process_group()
                _connect(folder, name)
    dist.destroy_process_group()


def skip_alone() -> None:
    """Skip a case of what is divided among processes where there is one (`on_gpus.py` on one GPU)."""
    if WORLD == 1:
        raise SkipTest("one process holds the whole")


def is_fine(outcome: str) -> bool:
    """Whether a case passed, or said why it could not run."""
    return outcome == PASSED or outcome.startswith(SKIPPED)


def _outcome(case: Case) -> str:
    try:
        case()
    except SkipTest as reason:
        return f"{SKIPPED}{reason}"
    except (Exception, pytest.fail.Exception):
        return traceback.format_exc()
    return PASSED


def _connect(folder: Path, after: str) -> None:
    import torch.distributed as dist

    # gloo too, for parameters that FSDP keeps on the CPU
    backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    meeting = f"file://{folder}/after-{after.replace(' ', '-')}"
    dist.init_process_group(backend, init_method=meeting, rank=RANK, world_size=WORLD, timeout=_LONGEST_WAIT)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
