"""`import liger` is cheap, and brings nothing along that its user may never need."""

from __future__ import annotations

import json
import subprocess
import sys

IMPORT = """
import json, sys, time
import torch
before, began = set(sys.modules), time.process_time()
import liger
seconds = time.process_time() - began
print(json.dumps({"seconds": seconds, "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before})}))
"""


def test_importing_liger_takes_under_a_fifth_of_a_second_beyond_torch_and_brings_only_packaging():
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    brought = set(found["new"]) - sys.stdlib_module_names
    assert brought <= {"liger", "packaging"}, "transformers, Triton and every adapter wait until a model is patched"
    assert found["seconds"] < 0.2
