"""The suffix index of the pybind11 module _host against a table of all contexts, made as its definition says."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cerberus_ext._host import SuffixIndex

MAX_TOKEN = 2**31 - 1


class Contexts:
    """Every context of up to max_match tokens, with each token that has followed it: how often, and when last."""

    def __init__(self, max_match: int) -> None:
        self.max_match = max_match
        self.size = 0
        self.following: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}

    def add(self, text: Sequence[int], token: int) -> None:
        self.size += 1
        for m in range(1, min(len(text), self.max_match) + 1):
            followers = self.following.setdefault(tuple(text[-m:]), {})
            count, _ = followers.get(token, (0, 0))
            followers[token] = (count + 1, self.size)

    def match(self, text: Sequence[int]) -> tuple[int, int]:
        for m in range(min(len(text), self.max_match), 0, -1):
            if followers := self.following.get(tuple(text[-m:])):
                return m, max(followers, key=lambda token: followers[token])
        return 0, -1


class Specification:
    """What SuffixIndex has to answer."""

    def __init__(self, max_match: int = 24, max_tokens: int = 2**20) -> None:
        self.max_match, self.half = max_match, max_tokens // 2
        self.document: list[int] = []
        self.young, self.old = Contexts(max_match), Contexts(max_match)
        self.counts = np.zeros((max_match + 1, 2), np.int64)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if self.young.size == self.half:
                self.old, self.young = self.young, Contexts(self.max_match)
            length, draft = self.match(self.document)
            self.counts[length] += (1, draft == token)
            self.young.add(self.document, token)
            self.document.append(token)

    def end_document(self) -> None:
        self.document = []

    def match(self, text: Sequence[int]) -> tuple[int, int]:
        return max(self.young.match(text), self.old.match(text), key=lambda match: match[0])

    def propose_after(self, tail: Sequence[int], length: int) -> list[tuple[int, int]]:
        """(token, match) of each draft."""
        text, drafts = list(tail), []
        while len(drafts) < length and (match := self.match(text))[0] > 0:
            text.append(match[1])
            drafts.append((match[1], match[0]))
        return drafts

    def propose(self, length: int) -> list[tuple[int, int]]:
        return self.propose_after(self.document, length)

    def __len__(self) -> int:
        return self.young.size + self.old.size


def pairs(drafts: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, int]]:
    tokens, matches = drafts
    assert tokens.dtype == matches.dtype == np.int64
    return list(zip(tokens.tolist(), matches.tolist(), strict=True))


def assert_same(index: SuffixIndex, expected: Specification, length: int = 12) -> None:
    assert pairs(index.propose(length)) == expected.propose(length)
    np.testing.assert_array_equal(index.record(), expected.counts)
    assert len(index) == index.size == len(expected)


@st.composite
def texts(draw: st.DrawFn, most: int = 120) -> list[int]:
    """Of few tokens, so that they match: random, repeated, periodic, and pieces of themselves again."""
    alphabet = st.integers(0, draw(st.sampled_from([0, 1, 2, 5, 40])))
    text: list[int] = []
    for _ in range(draw(st.integers(0, 5))):
        kind = draw(st.sampled_from(["random", "period", "again"]))
        if kind == "random":
            text += draw(st.lists(alphabet, max_size=20))
        elif kind == "period":
            text += draw(st.lists(alphabet, min_size=1, max_size=4)) * draw(st.integers(1, 12))
        else:
            start = draw(st.integers(0, len(text)))
            text += text[start : start + draw(st.integers(0, 30))]
    return text[:most]


MAX_MATCH = st.sampled_from([1, 2, 3, 5, 24])
MAX_TOKENS = st.sampled_from([2, 3, 7, 20, 64, 2**20])


@given(text=texts(), max_match=MAX_MATCH, max_tokens=MAX_TOKENS)
@example(text=[0] * 100, max_match=24, max_tokens=2**20)
@example(text=[0] * 100, max_match=24, max_tokens=64)
@example(text=[0, 1] * 50, max_match=3, max_tokens=2**20)
def test_answers_are_the_specifications_after_every_token(text: list[int], max_match: int, max_tokens: int) -> None:
    index, expected = SuffixIndex(max_match, max_tokens), Specification(max_match, max_tokens)
    assert_same(index, expected)
    for token in text:
        index.extend([token])
        expected.extend([token])
        assert_same(index, expected)


@given(documents=st.lists(texts(60), max_size=5), tails=st.lists(texts(30)), max_match=MAX_MATCH, max_tokens=MAX_TOKENS)
@example(documents=[[1, 2, 3], [2, 4], [1, 2]], tails=[[3, 2], [3, 1], [1, 2]], max_match=24, max_tokens=2**20)
def test_documents_and_other_texts(
    documents: list[list[int]], tails: list[list[int]], max_match: int, max_tokens: int
) -> None:
    index, expected = SuffixIndex(max_match, max_tokens), Specification(max_match, max_tokens)
    for document in documents:
        for each in (index, expected):
            each.extend(document)
            each.end_document()
        assert_same(index, expected)
        index.end_document()  # once more changes nothing
    for tail in (*tails, *documents):
        assert pairs(index.propose_after(tail, 8)) == expected.propose_after(tail, 8)
    assert_same(index, expected)  # neither did the questions


@given(text=texts(), cuts=st.lists(st.integers(0, 120)), max_tokens=MAX_TOKENS)
def test_tokens_may_come_in_any_pieces(text: list[int], cuts: list[int], max_tokens: int) -> None:
    whole, pieces = SuffixIndex(5, max_tokens), SuffixIndex(5, max_tokens)
    whole.extend(text)
    for piece in np.split(np.array(text, np.int64), sorted(cuts)):
        pieces.extend(piece)
    assert pairs(pieces.propose(9)) == pairs(whole.propose(9))
    np.testing.assert_array_equal(pieces.record(), whole.record())
    assert len(pieces) == len(whole)


@given(text=texts(), length=st.integers(0, 40))
def test_the_texts_end_is_a_tail_like_any_other(text: list[int], length: int) -> None:
    index = SuffixIndex(5)
    index.extend(text)
    assert pairs(index.propose(length)) == pairs(index.propose_after(text, length))
    assert pairs(index.propose(length)) == pairs(index.propose(40))[:length]


def words() -> list[int]:
    """A text that people wrote, as numbers: this repository's test of the trees, and its beginning again."""
    found = re.findall(r"\w+|\s+|[^\w\s]", Path(__file__).with_name("test_host.py").read_text())
    numbers: dict[str, int] = {}
    text = [numbers.setdefault(word, len(numbers)) for word in found]
    return text + text[:500]


@pytest.mark.parametrize("max_tokens", [1000, 2**20])
def test_ordinary_text(max_tokens: int) -> None:
    text = words()
    index, expected = SuffixIndex(24, max_tokens), Specification(24, max_tokens)
    for start in range(0, len(text), 97):
        index.extend(text[start : start + 97])
        expected.extend(text[start : start + 97])
        assert_same(index, expected, length=40)
    for start in range(0, len(text), 97):
        tail = text[start : start + 30]
        assert pairs(index.propose_after(tail, 10)) == expected.propose_after(tail, 10)


# ---------------------------------------------------------------- by hand


@pytest.mark.parametrize(
    ("text", "drafts"),
    [
        ([], []),
        ([7], []),  # nothing has followed 7
        ([7, 8], []),
        ([7, 7], [(7, 1)] * 4),  # of the two 7s only the first is followed by something
        ([7, 7, 7], [(7, 2)] * 4),
        ([1, 2, 3, 1], [(2, 1), (3, 2), (1, 3), (2, 1)]),  # nothing has followed 3 1, but 2 has followed 1
        ([1, 2, 1, 3, 1], [(3, 1), (1, 2), (3, 1), (1, 2)]),  # 2 and 3 equally often: the later one
        ([1, 2, 1, 2, 1, 3, 1], [(2, 1), (1, 2), (3, 3), (1, 4)]),  # 2 more often than 3, after 1 2 1 once each
        ([5, 1, 2, 6, 1, 3, 1, 3, 5, 1], [(2, 2), (6, 3), (1, 4), (3, 5)]),  # 3 more often, but 5 1 is longer
        # 9 1 stands before 2, 2, 3, and 8 1 before 3: as often, but 3 later.
        ([9, 1, 2, 9, 1, 2, 9, 1, 3, 8, 1, 3, 7, 1], [(3, 1), (7, 2), (1, 3), (3, 1)]),
        # 9 1 stands before 2, 2, 3, 2, 3.
        ([9, 1, 2, 9, 1, 2, 9, 1, 3, 9, 1, 2, 9, 1, 3, 8, 1], [(2, 1), (9, 2), (1, 3), (3, 4)]),
        ([0, MAX_TOKEN, 0], [(MAX_TOKEN, 1), (0, 2), (MAX_TOKEN, 1), (0, 2)]),
    ],
)
def test_drawn_by_hand(text: list[int], drafts: list[tuple[int, int]]) -> None:
    index = SuffixIndex()
    index.extend(text)
    assert pairs(index.propose(4)) == drafts


def test_a_match_is_never_longer_than_max_match() -> None:
    index = SuffixIndex(max_match=2)
    index.extend([1, 2, 3, 4, 1, 2, 3, 5, 0, 2, 3, 5, 1, 2, 3])
    assert pairs(index.propose(1)) == [(5, 2)]  # 1 2 3: once 4, once 5; 2 3: twice 5


def test_matches_do_not_run_across_documents() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3])
    index.end_document()
    assert pairs(index.propose(3)) == []
    index.extend([4, 2])
    index.end_document()
    index.extend([3])
    assert pairs(index.propose(3)) == []  # 3 was followed by another document only
    assert pairs(index.propose_after([9, 1], 3)) == [(2, 1), (3, 2)]
    assert pairs(index.propose_after([3, 4], 1)) == [(2, 1)]


def test_old_text_is_forgotten() -> None:
    index = SuffixIndex(max_tokens=8)
    index.extend([1, 2, 3, 4])
    index.extend([5, 6, 7, 8])
    assert len(index) == 8
    assert pairs(index.propose_after([1], 5)) == [(2, 1), (3, 2), (4, 3), (5, 4), (6, 5)]  # across the halves
    index.extend([9])
    assert len(index) == 5
    assert pairs(index.propose_after([1], 5)) == []
    assert pairs(index.propose_after([3, 4], 2)) == [(5, 2), (6, 3)]  # 5 is remembered, and so is what is before it


def test_record_by_hand() -> None:
    index = SuffixIndex(max_match=2)
    index.extend([1, 1, 1, 2, 1])
    # Before the tokens in turn: nothing; nothing has followed 1; 1 -> 1, right; 1 1 -> 1, wrong; nothing followed 2.
    assert index.record().tolist() == [[3, 0], [1, 1], [1, 0]]
    index.record()[:] = 99
    assert index.record().tolist() == [[3, 0], [1, 1], [1, 0]]


def test_any_integers_that_numpy_or_torch_hold() -> None:
    text = np.array([1, 9, 2, 9, 1, 9], np.int64)[::2]
    expected = SuffixIndex()
    expected.extend(text)
    for same in ([1, 2, 1], (1, 2, 1), text.astype(np.uint16), text.astype(np.int8), torch.tensor([1, 2, 1])):
        index = SuffixIndex()
        index.extend(same)
        assert pairs(index.propose(3)) == pairs(expected.propose(3)) == pairs(index.propose_after(same, 3))
        index.extend([])
        assert len(index) == 3


# ---------------------------------------------------------------- memory


def texts_of(count: int) -> dict[str, list[int]]:
    """Texts of `count` tokens that ask for different amounts of memory."""
    generator = random.Random(0)
    half = [generator.randrange(50000) for _ in range(count // 2)]
    return {
        "one token": [3] * count,
        "period": [3, 4] * (count // 2),
        "random, few tokens": [generator.randrange(4) for _ in range(count)],
        "random, many tokens": [generator.randrange(50000) for _ in range(count)],
        "all different": list(range(count)),
        "again": half + half,
    }


@pytest.mark.parametrize("kind", texts_of(2))
def test_memory_per_token(kind: str) -> None:
    # A token brings at most two nodes of 24 bytes and three counts of 16, each with at least 5/7 of a 4-byte slot in a
    # table, and 4 bytes of text; arrays grow by a half.
    index = SuffixIndex()
    index.extend(texts_of(20000)[kind])
    assert index.nbytes < 20000 * (4 + 2 * (24 + 7 / 5 * 4) + 3 * (16 + 7 / 5 * 4)) * 1.5 + 4096
    if kind in ("one token", "period"):
        assert index.nbytes < 20000 * 4 * 1.5 + 16384  # the text itself and a few nodes


def test_memory_of_a_sequence() -> None:
    index = SuffixIndex()
    assert index.nbytes < 2000
    text = words()[:2000]
    index.extend(text)
    assert index.nbytes < 250_000


def test_memory_is_bounded() -> None:
    index = SuffixIndex(max_tokens=2000)
    generator = random.Random(0)
    most = 0
    for _ in range(50):
        index.extend([generator.randrange(100) for _ in range(500)])
        assert 1000 <= len(index) <= 2000 or len(index) == 500
        most = max(most, index.nbytes)
        assert index.nbytes < 2000 * 200 * 1.5
    assert most > 2000 * 4


# ---------------------------------------------------------------- bad input

TOKENS = [
    (["a"], r"must be a 1-D array of integers, got 1-D of dtype <U1"),
    ([1.0], r"must be a 1-D array of integers, got 1-D of dtype float64"),
    ([True], r"must be a 1-D array of integers, got 1-D of dtype bool"),
    ([[1, 2]], r"must be a 1-D array of integers, got 2-D of dtype int64"),
    ([[1], [2, 3]], r"must be a 1-D array of integers, got <class 'list'>"),
    (7, r"must be a 1-D array of integers, got 0-D of dtype int64"),
    (None, r"must be a 1-D array of integers, got 0-D of dtype object"),
    ([2**63], r"must be a 1-D array of integers, got 1-D of dtype uint64"),
    ([5, 6, -1], r"\[2\] must be in 0 .. 2147483647, got -1"),
    ([5, 2**31, 6], r"\[1\] must be in 0 .. 2147483647, got 2147483648"),
    ([-(2**63)], r"\[0\] must be in 0 .. 2147483647, got -9223372036854775808"),
]


@pytest.mark.parametrize(("tokens", "message"), TOKENS)
def test_bad_tokens_change_nothing(tokens: object, message: str) -> None:
    index, expected = SuffixIndex(), Specification()
    for each in (index, expected):
        each.extend([5, 6, 5])
    space = "" if message.startswith("\\[") else " "
    with pytest.raises(ValueError, match=f"^SuffixIndex.extend: tokens{space}{message}"):
        index.extend(tokens)
    with pytest.raises(ValueError, match=f"^SuffixIndex.propose_after: tail{space}{message}"):
        index.propose_after(tokens, 1)
    assert_same(index, expected)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"max_match": 0}, r"max_match must be in 1 .. 1024, got 0"),
        ({"max_match": 1025}, r"max_match must be in 1 .. 1024, got 1025"),
        ({"max_match": -(2**63)}, r"max_match must be in 1 .. 1024, got -9223372036854775808"),
        ({"max_tokens": 1}, r"max_tokens must be in 2 .. 1073741824, got 1"),
        ({"max_tokens": 2**30 + 1}, r"max_tokens must be in 2 .. 1073741824, got 1073741825"),
    ],
)
def test_bad_sizes(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^SuffixIndex: {message}"):
        SuffixIndex(**sizes)


@pytest.mark.parametrize("length", [-1, 2**20 + 1])
def test_bad_length(length: int) -> None:
    index = SuffixIndex()
    with pytest.raises(ValueError, match=rf"^SuffixIndex.propose: length must be in 0 .. 1048576, got {length}"):
        index.propose(length)
    with pytest.raises(ValueError, match=rf"^SuffixIndex.propose_after: length must be in 0 .. 1048576, got {length}"):
        index.propose_after([1], length)


@pytest.mark.parametrize("wrong", [None, 1.5, "3", [2], 2**70])
def test_numbers_of_another_type(wrong: object) -> None:
    index = SuffixIndex()
    calls = [
        lambda: SuffixIndex(max_match=wrong),
        lambda: SuffixIndex(max_tokens=wrong),
        lambda: index.propose(wrong),
        lambda: index.propose_after([1], wrong),
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()


def test_the_limits_themselves() -> None:
    index = SuffixIndex(max_match=1024, max_tokens=2)
    index.extend([1] * 3000)
    assert pairs(index.propose(2)) == [(1, 1024), (1, 1024)]
    assert (index.max_match, index.max_tokens, len(index)) == (1024, 2, 2)
    assert len(SuffixIndex(1, 2**30).propose(2**20)[0]) == 0
