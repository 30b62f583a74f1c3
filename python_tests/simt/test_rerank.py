"""rerank: the CUDA kernel under emulation against the reference."""

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, rerank_inputs

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    ("rows", "heads", "drafts", "rank"),
    [(0, 3, 4, 8), (1, 1, 4, 8), (1, 2, 1, 1), (1, 4, 32, 64), (3, 2, 7, 33), (2, 3, 17, 40), (2, 4, 31, 16)],
)
def test_sizes(rows, heads, drafts, rank, offset, dtype, simt):
    a = rerank_inputs(rows, heads, drafts, rank, dtype=dtype)
    assert_close("rerank", simt("rerank", *a.values(), offset=offset), reference.rerank(**a), dtype, cuda=True)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["logprobs", "parents", "children", "slopes", "rest"])
def test_what_is_no_number(name, number, simt):
    a = rerank_inputs(2, 3, 9, 8)
    a[name].view(-1)[:2] = number
    assert_close("rerank", simt("rerank", *a.values()), reference.rerank(**a), torch.float32, cuda=True)


def test_what_is_no_token(simt):
    a = rerank_inputs(2, 3, 9, 8)
    a["ids"][0, 1, 3], a["ids"][1, 0, 0], a["ids"][1, 2, 8] = -1, 50, 2**62
    assert_close("rerank", simt("rerank", *a.values()), reference.rerank(**a), torch.float32, cuda=True)
