"""How the rows of a head's input are cut into chunks."""

from __future__ import annotations

import pytest
import torch

from liger.ops import linear_chunks


def test_default_is_at_most_1280_rows_of_a_large_vocabulary():
    sizes = [stop - start for start, stop in linear_chunks.chunks(8192, 128256, 2, 8192 * 128256)]
    assert len(sizes) == 7
    assert set(sizes) == {1152, 1280}
    assert sum(sizes) == 8192


@pytest.mark.parametrize(
    ("rows", "columns", "count"),
    [(4096, 32000, 1), (8192, 32000, 2), (16384, 32000, 2), (32768, 32000, 8), (16384, 128256, 8), (3000, 50257, 2)],
)
def test_the_weights_gradient_is_rounded_twice_where_rows_are_many_beside_the_classes(rows, columns, count):
    parts = linear_chunks.chunks(rows, columns, 2, columns * 4096 * 2)
    assert len(parts) == count
    assert max(stop - start for start, stop in parts) * columns * 2 <= max(2**29, columns * 4096 * 2)


@pytest.mark.parametrize("rows", [0, 1, 127, 129, 8200, 12345])
@pytest.mark.parametrize("columns", [1, 32000, 262145])
@pytest.mark.parametrize("weight_gradient_bytes", [0, 2**28, 2**31])
def test_cover_every_row_once_in_balanced_chunks(rows, columns, weight_gradient_bytes):
    parts = linear_chunks.chunks(rows, columns, 2, weight_gradient_bytes)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts)][:-1] if rows else parts == []
    assert not rows or parts[-1][1] == rows
    sizes = [stop - start for start, stop in parts]
    assert all(size > 0 for size in sizes)
    assert max(sizes, default=0) - min(sizes, default=0) <= 2 * 128
    assert all(start % 128 == 0 for start, _ in parts)
    most = linear_chunks.CHUNK_BYTES * (2 if weight_gradient_bytes and linear_chunks.updates(rows, columns) == 2 else 1)
    assert max(sizes, default=0) * columns * 2 <= max(most, weight_gradient_bytes)


def test_memory_budget_is_obeyed_when_no_weight_gradient_is_computed(monkeypatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 10 * 300 * 2)
    assert max(stop - start for start, stop in linear_chunks.chunks(95, 300, 2)) == 10


def test_a_row_larger_than_the_budget_is_a_chunk(monkeypatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 1)
    assert linear_chunks.chunks(3, 300, 2) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.gpu
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_nvidia_gpu_multiplies_into_fp32_whatever_the_default_dtype(device, default, dtype):
    if torch.version.hip is not None:
        pytest.skip("not in all versions")
    linear_chunks._multiplies_into_fp32.cache_clear()
    torch.set_default_dtype(default)
    try:
        assert linear_chunks._multiplies_into_fp32(device, dtype)
    finally:
        torch.set_default_dtype(torch.float32)
