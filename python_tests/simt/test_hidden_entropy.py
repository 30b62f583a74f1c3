"""hidden_entropy: the CUDA kernel under emulation against the reference."""

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, normal

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("rows", "size"), [(0, 8), (1, 1), (5, 7), (3, 33), (2, 64), (2, 129), (1, 1032), (1, 2056), (1, 4100)]
)
def test_sizes(rows, size, offset, dtype, simt):
    hidden = normal(rows, size, seed=size, scale=3.0, dtype=dtype)
    assert_close(
        "hidden_entropy", simt("hidden_entropy", hidden, offset=offset), reference.hidden_entropy(hidden), dtype
    )


@dtypes
def test_extremes(dtype, simt):
    """All equal gives log D, one far above the rest 0, wherever the values lie; NaN stays NaN."""
    rows = torch.zeros(5, 136)
    rows[1] = 20000.0
    rows[2, 7] = 30000.0
    rows[3] = -30000.0
    rows[3, 135] = -29000.0
    rows[4, 100] = math.nan
    log_size = math.log(136)
    expected = torch.tensor([log_size, log_size, 0.0, 0.0, math.nan])
    torch.testing.assert_close(simt("hidden_entropy", rows.to(dtype)), expected, rtol=1e-6, atol=1e-6, equal_nan=True)
