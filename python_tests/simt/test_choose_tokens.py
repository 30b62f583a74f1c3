"""choose_tokens: the CUDA kernels under emulation against the reference, which they equal token for token."""

import math

import pytest
import torch
from op_cases import DTYPES, integers, normal

from cerberus_ext.ops import reference
from cerberus_ext.ops.verify import sampling_numbers

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(simt, logits, positions, *rest, offset=0):
    tokens = simt("choose_tokens", logits, positions, *rest, offset=offset)
    assert torch.equal(tokens, reference.choose_tokens(logits, positions, *rest))


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 8), (1, 1), (3, 33), (2, 512), (1, 1000), (2, 2600)])
def test_greedy(rows, vocab, offset, dtype, simt):
    """Small whole numbers, so that ties are the rule."""
    check(simt, integers(-3, 4, rows, vocab).to(dtype), torch.arange(rows), 5, 0.0, 3, 0.5, offset=offset)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.9), (20, 0.6), (10000, 0.999), (1, 0.1)])
@pytest.mark.parametrize(("rows", "vocab"), [(0, 8), (2, 1), (3, 33), (1, 520), (1, 1001)])
def test_sampled(rows, vocab, top_k, top_p, dtype, simt):
    logits = normal(rows, vocab, seed=vocab, scale=2.0, dtype=dtype)
    positions = torch.arange(2**33, 2**33 + rows)
    for seed, temperature in ((0, 1.0), (-12345678901234, 0.3)):
        check(simt, logits, positions, seed, temperature, top_k, top_p)


@dtypes
def test_numbers_on_the_device(dtype, simt):
    """They count, and not the arguments; at temperature 0, which is the caller's to say, nothing does."""
    logits, positions = normal(3, 300, scale=2.0, dtype=dtype), torch.arange(3)
    for numbers in ((-(2**63) + 5, 0.7, 40, 0.9), (3, 2.5, 0, 1.0)):
        expected = reference.choose_tokens(logits, positions, *numbers)
        given = (logits, positions, 1, 1.0, 3, 0.5, sampling_numbers(*numbers))
        assert torch.equal(simt("choose_tokens", *given), expected)
        assert torch.equal(reference.choose_tokens(*given), expected)
        check(simt, logits, positions, 1, 0.0, 3, 0.5, given[-1])


@dtypes
def test_unaligned(dtype, simt):
    check(simt, normal(2, 64, scale=2.0, dtype=dtype), torch.arange(2), 1, 0.8, 9, 0.9, offset=1)


@dtypes
@pytest.mark.parametrize("schedule", range(4))
def test_schedules(schedule, dtype, simt):
    """Ties at the border of top_k and top_p."""
    simt.seed(schedule)
    check(simt, integers(-3, 3, 2, 200).to(dtype), torch.arange(2), 7, 1.5, 60, 0.7)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e-30])
def test_what_is_not_finite(temperature, top_p, dtype, simt):
    logits = normal(6, 70, dtype=dtype)
    logits[0, ::3] = -math.inf
    logits[1, 1::4] = math.nan
    logits[2, ::7] = math.inf
    logits[3] = -math.inf
    logits[4] = math.nan
    logits[5, ::2], logits[5, 1::2] = -0.0, 0.0
    check(simt, logits, torch.arange(6), 11, temperature, 5, top_p)
