"""The suffix index at 100 000 tokens: nanoseconds to append a token, microseconds of a decoding step, bytes per token.

    pytest bench/micro/test_suffix_bench.py --benchmark-only

`append` indexes the whole text in one call. `step` goes on from there as decoding does, a token at a time: each is
appended, then 8 tokens are drafted; both calls from Python are in it. The words are a text that people wrote, Python's
reference manual; the other texts ask for the most memory or the most work. The table at the end is conftest.py's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from functools import cache
from pydoc_data.topics import topics

import numpy as np
import pytest

from cerberus_ext._host import SuffixIndex

TOKENS = 100_000
STEPS = 2_000
DRAFTS = 8
ROUNDS = 7


def words() -> list[int]:
    """A number for each word, with the space before it, and for each punctuation mark."""
    found = re.findall(r" ?\w+|\s+|[^\w\s]+", "\n".join(topics[name] for name in sorted(topics)))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(word, len(numbers)) for word in found]


def drawn(alphabet: int, count: int) -> list[int]:
    generator = random.Random(0)
    return [generator.randrange(alphabet) for _ in range(count)]


MOST = TOKENS + STEPS
TEXTS: dict[str, Callable[[], list[int]]] = {
    "words": words,
    "words, twice": lambda: words()[: MOST // 2] * 2,
    "one token": lambda: [7] * MOST,
    "period 2": lambda: [7, 8] * (MOST // 2),
    "random, 4 tokens": lambda: drawn(4, MOST),
    "random, 49152 tokens": lambda: drawn(49152, MOST),
}


@cache
def text_of(kind: str) -> np.ndarray:
    text = np.array(TEXTS[kind](), np.int64)
    assert len(text) >= MOST
    return text[:MOST]


@pytest.mark.parametrize("kind", TEXTS)
def test_append(kind, benchmark):
    text = text_of(kind)[:TOKENS]
    index = SuffixIndex()

    def setup():
        nonlocal index
        index = SuffixIndex()

    benchmark.group = "suffix index, append"
    benchmark.pedantic(lambda: index.extend(text), setup=setup, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        text=kind,
        call="append",
        nanoseconds=benchmark.stats.stats.median / TOKENS * 1e9,
        bytes_per_token=index.nbytes / TOKENS,
    )


@pytest.mark.parametrize("kind", TEXTS)
def test_step(kind, benchmark):
    text = text_of(kind)
    steps = [text[i : i + 1] for i in range(TOKENS, MOST)]
    index = SuffixIndex()

    def setup():
        nonlocal index
        index = SuffixIndex()
        index.extend(text[:TOKENS])

    def decode():
        for token in steps:
            index.extend(token)
            index.propose(DRAFTS)

    benchmark.group = "suffix index, step"
    benchmark.pedantic(decode, setup=setup, rounds=ROUNDS, warmup_rounds=1)
    benchmark.extra_info.update(
        text=kind,
        call="step",
        nanoseconds=benchmark.stats.stats.median / STEPS * 1e9,
        bytes_per_token=index.nbytes / MOST,
    )
