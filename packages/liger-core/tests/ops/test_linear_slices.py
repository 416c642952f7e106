"""The grid of linear_slices: what covers every row and class once, and what memory it takes."""

from __future__ import annotations

import pytest
import torch

from liger.ops.linear_slices import grid, through_slices

MEMORY = 256 * 2**20
SHAPES = [(8192, 4096, 128256), (16384, 2048, 128256), (16384, 4096, 32000), (5, 64, 50257), (300_000, 8192, 32001)]


@pytest.mark.parametrize(("rows", "width", "columns"), [*SHAPES, (7, 3, 1), (0, 4, 9)])
def test_every_row_and_class_is_in_one_part(rows, width, columns):
    blocks, slices = grid(rows, width, columns, 2, MEMORY)
    for parts, length in ((blocks, rows), (slices, columns)):
        ends = [0, *(stop for _, stop in parts)]
        assert ends == [*(start for start, _ in parts), length]
        assert all(start < stop for start, stop in parts)


@pytest.mark.parametrize(("rows", "width", "columns"), SHAPES)
def test_memory_and_roundings_are_bounded(rows, width, columns):
    blocks, slices = grid(rows, width, columns, 2, MEMORY)
    height = max(stop - start for start, stop in blocks)
    breadth = max(last - first for first, last in slices)
    assert len(blocks) <= 2
    if len(blocks) < 2:
        assert height * width * 4 <= MEMORY
        assert height * breadth * 2 <= MEMORY
        assert height * width * 4 + height * breadth * 2 <= MEMORY * 3 // 2


def test_columns_beside_whole_lines_are_a_slice_of_their_own():
    assert grid(8192, 2048, 50257, 2, MEMORY)[1][-1] == (50240, 50257)
    assert grid(8192, 2048, 1000, 2, MEMORY)[1] == [(0, 1000)]


def test_no_rows_have_zero_gradients():
    x, weight, bias = torch.empty(0, 4), torch.ones(9, 4), torch.ones(9)
    dx, dw, db = through_slices(x, weight, bias, torch.float32, lambda *_: None, (True, True, True))
    assert dx.shape == (0, 4)
    assert torch.equal(dw, torch.zeros(9, 4))
    assert torch.equal(db, torch.zeros(9))
