"""head_stack: the CUDA kernels under emulation against the reference."""

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, assert_same_bits, normal

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def inputs(rows, heads, layers, size, chained, dtype):
    columns = 2 * size if chained else size
    return (
        normal(rows, size, seed=1, dtype=dtype),
        normal(rows, size, seed=2, dtype=dtype),
        normal(layers, heads, size, columns, seed=3, scale=columns**-0.5, dtype=dtype),
        normal(layers, heads, size, seed=4, dtype=dtype),
    )


def check(simt, arguments, offset=0):
    states = simt("head_stack", *arguments, offset=offset)
    assert_close("head_stack", states, reference.head_stack(*arguments), arguments[0].dtype)
    return states


@dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "layers", "size", "chained"),
    [
        (0, 4, 2, 16, True),
        (1, 1, 1, 1, True),
        (3, 2, 2, 1, False),
        # Sizes that no load and no tile divides.
        (1, 4, 2, 33, True),
        (5, 3, 2, 7, False),
        (9, 2, 3, 13, True),
        # Tiles that end inside a head; a part of the columns that is a chunk, less or a bit more.
        (1, 3, 4, 8, True),
        (2, 3, 2, 24, True),
        (1, 4, 3, 40, False),
        (3, 1, 3, 72, True),
        # Slices longer than what is on its way, and several tiles for a warp.
        (1, 2, 1, 264, True),
        (1, 1, 2, 520, False),
        (3, 4, 2, 64, True),
        # Every number of rows that a product is made for, and more.
        (8, 3, 2, 48, False),
        (16, 2, 2, 16, True),
        (17, 2, 2, 8, True),
        (33, 2, 2, 24, True),
        (64, 1, 2, 16, False),
        (70, 1, 2, 16, True),
    ],
)
def test_sizes(rows, heads, layers, size, chained, dtype, simt):
    check(simt, inputs(rows, heads, layers, size, chained, dtype))


@dtypes
@pytest.mark.parametrize(("rows", "chained"), [(1, True), (5, False), (9, True)])
def test_unaligned(rows, chained, dtype, simt):
    check(simt, inputs(rows, 3, 2, 16, chained, dtype), offset=1)


@dtypes
@pytest.mark.parametrize("device", [(1, 1), (2, 1), (20, 2)], ids=str)
def test_devices(device, dtype, simt):
    """One block for all, fewer than it was split for, and more than there are tiles."""
    simt.device(*device)
    check(simt, inputs(9, 3, 3, 24, True, dtype))


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("schedule", range(4))
def test_schedules(schedule, rows, dtype, simt):
    simt.seed(schedule)
    check(simt, inputs(rows, 2, 3, 32, True, dtype))


@dtypes
@pytest.mark.parametrize("size", [40, 33])
def test_rows_are_computed_alike(size, dtype, simt):
    """Bit for bit, whatever the other rows are and however many."""
    hidden, anchor, weight, bias = inputs(70, 2, 2, size, True, dtype)
    all_rows = simt("head_stack", hidden, anchor, weight, bias)
    for rows in (slice(69, 70), slice(5, 16), slice(3, 29)):
        some = simt("head_stack", hidden[rows].contiguous(), anchor[rows].contiguous(), weight, bias)
        assert_same_bits(some, all_rows[rows])


@dtypes
@pytest.mark.parametrize("rows", [1, 20])
def test_nan_stays_in_its_row(rows, dtype, simt):
    arguments = inputs(rows, 2, 2, 16, True, dtype)
    clean = simt("head_stack", *arguments)
    arguments[0][rows - 1] = math.nan
    states = simt("head_stack", *arguments)
    assert states[-1].isnan().all()
    assert_same_bits(states[:-1], clean[:-1])


@dtypes
def test_far_from_zero(dtype, simt):
    """silu where exp(-x) leaves float32."""
    before = [-30000.0, -1000.0, -200.0, -100.0, -90.0, -89.0, -88.5, -88.0, -80.0, -20.0, 0.0, 80.0, 88.0, 100.0]
    bias = torch.tensor([[[*before, 30000.0, 1.0]]]).to(dtype)
    zeros, weight = torch.zeros(3, 16, dtype=dtype), torch.zeros(1, 1, 16, 32, dtype=dtype)
    check(simt, (zeros, zeros, weight, bias))
