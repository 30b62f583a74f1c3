"""`_host.read_drafts` against the same in NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cerberus_ext import _host
from cerberus_ext.drafting.platt import PlattScaling, reading

VOCAB = 50
LINES = [(1.3, 0.2), (0.7, -0.5), (-1.0, 0.0), (1e6, 3.0)]


def expected(ids: np.ndarray, logprobs: np.ndarray, platt: PlattScaling | None, depth: int) -> tuple[np.ndarray, ...]:
    probabilities = reading(platt)(np.minimum(logprobs, 0.0, dtype=np.float64))
    known = (ids >= 0) & (ids < VOCAB) & (probabilities > 0)
    last = np.argsort(~known, axis=1, kind="stable")
    ids = np.take_along_axis(np.where(known, ids, 0), last, 1)
    probabilities = np.take_along_axis(np.where(known, probabilities, 0.0), last, 1)
    return ids[:depth], np.minimum.accumulate(probabilities, axis=1)[:depth]


@pytest.mark.parametrize("platt", [None, LINES], ids=["as they are", "corrected"])
@pytest.mark.parametrize("depth", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("seed", range(5))
def test_equals_numpy(seed: int, depth: int, platt: PlattScaling | None) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(-3, VOCAB + 3, (4, 8))
    logprobs = -np.sort(random.exponential(3, (4, 8))).astype(np.float32)
    for wrong in (-math.inf, math.inf, math.nan, 1.0, -1e30, 0.0):
        logprobs[random.integers(4), random.integers(8)] = wrong
    lines = None if platt is None else np.array(platt)
    got = _host.read_drafts(ids, logprobs, lines, VOCAB, depth)
    for have, want in zip(got, expected(ids, logprobs, platt, depth), strict=True):
        assert have.shape == want.shape and have.dtype == want.dtype
        np.testing.assert_allclose(have, want, rtol=1e-12)


def test_takes_any_array_of_numbers() -> None:
    ids, logprobs = np.array([[3, 1]], np.int32), np.broadcast_to(np.float64(-1.0), (1, 2))
    tokens, probabilities = _host.read_drafts(ids, logprobs, None, VOCAB, 1)
    assert tokens.tolist() == [[3, 1]] and probabilities.tolist() == [[math.exp(-1.0)] * 2]
    assert _host.read_drafts(np.empty((0, 0), np.int64), np.empty((0, 0)), None, VOCAB, 3)[0].shape == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": np.zeros(2, np.int64)}, "ids must be a 2-D array of integers"),
        ({"ids": np.zeros((2, 3))}, "ids must be a 2-D array of integers"),
        ({"logprobs": np.zeros((2, 3), np.int64)}, "logprobs must be a 2-D array of real numbers"),
        ({"logprobs": np.zeros((2, 4))}, "ids and logprobs must have one shape"),
        ({"platt": np.zeros((3, 2))}, "platt must be a contiguous array of dtype float64"),
        ({"max_depth": -1}, "max_depth must be >= 0"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "ids": np.zeros((2, 3), np.int64), "logprobs": np.zeros((2, 3)), "platt": None, "vocabulary": VOCAB,
        "max_depth": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"read_drafts: {message}"):
        _host.read_drafts(**arguments | change)
