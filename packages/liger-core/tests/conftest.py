"""What several tests use: the size of a chunk, a record of what was allocated, a model with and without our loss."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapted_models import LLAMA_HEAD, llama
from liger.ops import linear_chunks, linear_slices
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.tiny import batch


@pytest.fixture
def chunk_rows(monkeypatch):
    """Sets how many rows a chunk has, and into how many slices of classes a block of so many rows is cut."""

    def set_rows(size, slices=3):
        def fixed(rows, *_):
            return [(start, min(start + size, rows)) for start in range(0, rows, size)]

        def grid(rows, width, columns, *_):
            return fixed(rows), linear_chunks.edges(columns, -(-columns // slices), 1)

        monkeypatch.setattr(linear_chunks, "chunks", fixed)
        monkeypatch.setattr(linear_slices, "grid", grid)

    return set_rows


class Allocations(TorchDispatchMode):
    """Records the largest number of bytes that new tensors held at one time, and how large each of them was."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.sizes, self.known = 0, 0, [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in inputs | self.known:
                self._add(t.untyped_storage())
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        self.sizes.append(size)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.fixture
def allocations():
    """Runs a function and returns the record of what it allocated."""

    def record(function):
        with Allocations() as mode:
            function()
        return mode

    return record


@pytest.fixture
def pair(device):
    """(stock, patched) of the same weights; only the loss is patched."""
    stock = llama(device)
    patched = copy.deepcopy(stock)
    apply_adapters(patched, [LLAMA_HEAD], loss="linear")
    return stock, patched


@pytest.fixture
def inputs(device):
    """Ids and labels for `pair`."""
    return batch(TINY["vocab_size"], device)
