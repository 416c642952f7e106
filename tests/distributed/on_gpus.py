"""Every case of this folder on a host with several GPUs, one process each, through NCCL.

    torchrun --nproc-per-node N tests/distributed/on_gpus.py [WORD …]

Runs the cases whose name has all the words, and tells how each ended; the exit status is 1 if one failed. Without GPUs
the processes talk through gloo, on the CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch

os.environ["CASES_DEVICE"] = "cuda" if torch.cuda.is_available() else "cpu"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from pair import DEVICE, PASSED, RANK, WORLD, cases, is_fine, run, told


def main() -> int:
    names = [name for name in cases() if all(word in name for word in sys.argv[1:])]
    folder = Path(tempfile.gettempdir(), f"cases-{os.environ['MASTER_PORT']}-{os.getppid()}")
    folder.mkdir(exist_ok=True)
    run(folder, names)
    if RANK != 0:
        return 0
    failed = 0
    for name in names:
        outcomes = told(folder, name, WORLD, "did not end")
        worst = next((o for o in outcomes if not is_fine(o)), next((o for o in outcomes if o != PASSED), PASSED))
        failed += not is_fine(worst)
        sys.stdout.write(f"{name}: {worst}\n")
    sys.stdout.write(f"{len(names)} cases in {WORLD} processes on {DEVICE}, {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # where gloo's threads still run, torch aborts a process that ends as usual
