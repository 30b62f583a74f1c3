"""What the text's own past, other documents and the heads draft, and how far each of them trusts itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cerberus_ext.drafting.proposers import Drafts, HeadsDrafts, HeadsProposer, ask_proposer, join_tables
from cerberus_ext.drafting.suffix import DocumentProposer, SuffixProposer, probabilities_by_match

LIST = [7, 1, 2, 3, 9, 7, 1, 2, 4, 9, 7, 1]  # after 7 1: twice 2


def pairs(drafts: tuple[Any, Any]) -> list[tuple[int, float]]:
    tokens, probabilities = drafts
    assert len(tokens) == len(probabilities)
    return [(int(token), float(probability)) for token, probability in zip(tokens, probabilities, strict=True)]


# ---------------------------------------------------------------- how far a match is trusted


def test_longer_matches_are_trusted_more() -> None:
    probabilities = probabilities_by_match(np.zeros((25, 2), np.int64))
    assert probabilities.shape == (25,) and probabilities[0] == 0
    assert (np.diff(probabilities) >= 0).all() and 0.1 < probabilities[1] < probabilities[4] < probabilities[24] < 1


@pytest.mark.parametrize("longest", [1, 3, 24, 25, 100])
def test_every_length_has_a_chance(longest: int) -> None:
    """Beyond those that were measured, the last one's."""
    usual = probabilities_by_match(np.zeros((25, 2), np.int64))
    probabilities = probabilities_by_match(np.zeros((longest + 1, 2), np.int64))
    assert probabilities.tolist() == [usual[min(m, 24)] for m in range(longest + 1)]


def test_a_texts_own_record_counts_more_and_more() -> None:
    usual = probabilities_by_match(np.zeros((4, 2), np.int64))[3]
    for tries in (1, 10, 100, 10**6):
        record = np.zeros((4, 2), np.int64)
        record[3] = tries, 0
        never = probabilities_by_match(record)
        record[3] = tries, tries
        always = probabilities_by_match(record)
        weight = tries / (tries + 10)
        assert never[3] == pytest.approx((1 - weight) * usual)
        assert always[3] == pytest.approx(min((1 - weight) * usual + weight, 0.995))
        assert never[:3].tolist() == always[:3].tolist(), "other lengths stay as they are"


# ---------------------------------------------------------------- the text's own past


def test_suffix_proposer_drafts_what_followed() -> None:
    drafts = SuffixProposer()(LIST)
    drafted = pairs(drafts.propose(4))
    assert [token for token, _ in drafted] == [2, 4, 9, 7]
    drafts.extend([2])
    assert [token for token, _ in pairs(drafts.propose(2))] == [4, 9]
    assert pairs(SuffixProposer()([1, 2, 3]).propose(5)) == []


def test_suffix_proposer_learns_to_trust_a_list_and_to_distrust_a_story() -> None:
    period = SuffixProposer()([1, 2, 3, 4] * 2)
    first = pairs(period.propose(6))
    for _ in range(30):
        period.extend([1, 2, 3, 4])
    later = pairs(period.propose(6))
    assert [token for token, _ in first] == [token for token, _ in later] == [1, 2, 3, 4, 1, 2]
    assert later[0][1] > first[0][1] and later[0][1] <= 0.995
    # 5 is followed by another token every time: matches of one token are never right.
    story = SuffixProposer()([5, 10, 5, 11, 5])
    (_, before), *_ = pairs(story.propose(1))
    for token in range(12, 60):
        story.extend([token, 5])
    (_, after), *_ = pairs(story.propose(1))
    assert after < before / 3


def test_suffix_proposer_settings() -> None:
    assert SuffixProposer() == SuffixProposer(max_match=24, max_tokens=1 << 20)
    short = SuffixProposer(max_match=1)([1, 2, 3, 4, 2, 5, 1, 2])
    assert pairs(short.propose(1))[0][0] == 5, "of what followed 2, the last; with more context it would be 3"
    assert pairs(SuffixProposer()([1, 2, 3, 4, 2, 5, 1, 2]).propose(1))[0][0] == 3
    forgetful = SuffixProposer(max_tokens=4)([1, 2, 3, 4, 5, 6, 7, 8, 1])
    assert pairs(forgetful.propose(1)) == []


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SuffixProposer("x"), TypeError, "SuffixProposer: max_match must be an integer, got 'x'"),
        (lambda: SuffixProposer(0), ValueError, "SuffixProposer: max_match must be in 1..1024, got 0"),
        (lambda: SuffixProposer(1025), ValueError, "SuffixProposer: max_match must be in 1..1024, got 1025"),
        (lambda: SuffixProposer(8, 1), ValueError, "SuffixProposer: max_tokens must be in 2..1073741824, got 1"),
        (lambda: DocumentProposer(3), TypeError, "DocumentProposer: documents must be a sequence of .*, got 3"),
        (lambda: DocumentProposer("abc"), TypeError, "DocumentProposer: documents must be a sequence of .*, got 'abc'"),
        (lambda: DocumentProposer([[1]], 2.0), TypeError, "DocumentProposer: max_match must be an integer, got 2.0"),
        (lambda: DocumentProposer([[1]], 0), ValueError, "DocumentProposer: max_match must be in 1..1024, got 0"),
    ],
)
def test_wrong_settings(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        make()


def test_the_limits_are_those_of_the_index() -> None:
    for settings in ((1024, 2), (1, 1 << 30)):
        assert pairs(SuffixProposer(*settings)([1]).propose(1)) == []


def test_texts_do_not_share_a_past() -> None:
    proposer = SuffixProposer()
    first, second = proposer([1, 2, 1]), proposer([1, 3, 1])
    first.extend([2, 1])
    assert pairs(first.propose(1))[0][0] == 2 and pairs(second.propose(1))[0][0] == 3


# ---------------------------------------------------------------- documents


def test_document_proposer_drafts_from_documents_only() -> None:
    proposer = DocumentProposer([[1, 2, 3, 4], [9, 8, 7], []])
    drafts = proposer([5, 6, 5, 6, 1, 2])
    assert [token for token, _ in pairs(drafts.propose(4))] == [3, 4], "and not over the end into the next document"
    drafts.extend([9])
    assert [token for token, _ in pairs(drafts.propose(4))] == [8, 7]
    assert pairs(proposer([5, 6, 5]).propose(4)) == [], "the prompt is none of the documents"
    assert pairs(DocumentProposer([])([1, 2]).propose(4)) == []


def test_documents_say_what_a_match_is_worth() -> None:
    """Where they go on as they did before, the first draft is more likely than where they do not."""
    random = np.random.default_rng(0)
    alike = DocumentProposer([list(range(9))] * 30)
    unlike = DocumentProposer([[1, 2, 3, *random.integers(9, 99, 3).tolist()] for _ in range(30)])
    (_, likely), *_ = pairs(alike([1, 2, 3]).propose(1))
    (_, unlikely), *_ = pairs(unlike([1, 2, 3]).propose(1))
    assert likely > 0.8 and unlikely < 0.3


def test_documents_stay_as_they_are() -> None:
    """Whatever the texts say; and each text keeps its own record."""
    proposer = DocumentProposer([[1, 2, 3, 1, 2, 3, 1, 2, 3]])
    good, bad = proposer([1, 2]), proposer([1, 2])
    before = pairs(proposer([1, 2]).propose(5))
    for _ in range(20):
        good.extend([3, 1, 2])
        bad.extend([4, 1, 2])
    (token, high), *_ = pairs(good.propose(1))
    (other, low), *_ = pairs(bad.propose(1))
    assert token == other == 3 and high > before[0][1] > low
    assert pairs(proposer([1, 2]).propose(5)) == before


def test_document_record_by_hand() -> None:
    """Of a match of one token: right, wrong, right; the usual probability counts as ten tries."""
    proposer = DocumentProposer([[1, 2, 9, 1, 2, 9]], max_match=1)
    drafts = proposer([1])
    usual = pairs(drafts.propose(1))[0][1]
    drafts.extend([2])
    drafts.extend([1, 2])  # after 2 comes 9, not 1; after 1 comes 2
    assert pairs(drafts.propose(1)) == [(9, pytest.approx((2 + 10 * usual) / 13))]


def test_long_documents_are_not_forgotten() -> None:
    numbers = np.random.default_rng(0).integers(0, 1000, 5000)
    drafts = DocumentProposer([numbers[:2500], numbers[2500:].tolist()])(numbers[:30].tolist())
    assert [token for token, _ in pairs(drafts.propose(8))] == numbers[30:38].tolist()


@pytest.mark.parametrize(
    "documents", [["not tokenized"], [1, 2, 3], [[1.5, 2.5]], [[[1, 2]]], [[1, -2]], [[True, False]], [[[1], [2, 3]]]]
)
def test_documents_that_are_no_tokens(documents: Any) -> None:
    with pytest.raises(ValueError, match=r"^DocumentProposer: documents\[0\] must be token ids"):
        DocumentProposer(documents)


# ---------------------------------------------------------------- heads


class Step:
    """A stepper's part that a HeadsProposer sees."""

    def __init__(self, ids: Any, probabilities: Any) -> None:
        self.found = HeadsDrafts(np.array(ids, np.int64), np.log(np.array(probabilities, np.float32)))

    def drafts(self) -> HeadsDrafts:
        return self.found


STEP = Step([[5, 6], [7, 8], [9, 1]], [[0.5, 0.2], [0.5, 0.25], [0.9, 0.1]])


def test_heads_proposer_takes_probabilities_as_they_are() -> None:
    tokens, probabilities = HeadsProposer(STEP, 10).propose(2)
    assert np.asarray(tokens).tolist() == [[5, 6], [7, 8]]
    assert np.asarray(probabilities) == pytest.approx(np.array([[0.5, 0.2], [0.5, 0.25]]), rel=1e-6)
    assert np.asarray(HeadsProposer(STEP, 10).propose(9)[0]).shape == (3, 2)
    certain = Step([[5, 6]], [[1.0, 1e-30]])
    certain.found[1][0, 0] = 1e-7  # rounding may give a little more than certainty
    assert np.asarray(HeadsProposer(certain, 10).propose(1)[1])[0, 0] == 1.0


def test_heads_proposer_corrects_each_head() -> None:
    # logit 0.2 = log 1/4, doubled log 1/16; logit 0.25 = log 1/3, and log 3 more is 0
    probabilities = np.asarray(HeadsProposer(STEP, 10, [(2.0, 0.0), (1.0, math.log(3)), (-1.0, 0.0)]).propose(3)[1])
    assert probabilities[0] == pytest.approx([0.5, 1 / 17], rel=1e-5)
    assert probabilities[1] == pytest.approx([0.75, 0.5], rel=1e-5)
    assert probabilities[2] == pytest.approx([0.1, 0.1], rel=1e-5), "turned round, all drafts are alike"


@pytest.mark.parametrize("platt", [None, [(1.0, 0.0)] * 4, [(1.0, 3.0)] * 4, [(1.0, math.nan)] * 4])
def test_heads_proposer_leaves_out_what_is_no_draft(platt: Any) -> None:
    """A probability of 0, or none at all, and a token that the model does not have."""
    step = Step([[5, 6, 7], [5, 6, 10], [-1, 8, 9], [5, 6, 7]], [[0.5, 0.2, 0.1]] * 4)
    step.found[1][0, 1] = math.nan
    step.found[1][1, 0] = -math.inf
    step.found[1][3] = math.nan
    drafted = ask_proposer(HeadsProposer(step, 10, platt), 5)
    kept = [drafted.tokens[row][drafted.probabilities[row] > 0].tolist() for row in range(4)]
    if platt is not None and platt[0][1] != platt[0][1]:
        assert kept == [[], [], [], []], "a correction that is no number leaves nothing"
    else:
        assert kept == [[5, 7], [6], [8, 9], []], "in their order"
    assert ((drafted.tokens >= 0) & (drafted.tokens < 10)).all() and np.isfinite(drafted.probabilities).all()


@pytest.mark.parametrize("platt", [None, ()])
def test_no_heads_draft_nothing(platt: Any) -> None:
    step = Step(np.empty((0, 0)), np.empty((0, 0)))
    drafted = ask_proposer(HeadsProposer(step, 10, platt), 5)
    assert drafted.tokens.size == drafted.probabilities.size == 0


# ---------------------------------------------------------------- several tables as one


def table(tokens: Any, probabilities: Any) -> Drafts:
    return Drafts(np.array(tokens, np.int64), np.array(probabilities, np.float64))


def test_joined_tables_are_best_first() -> None:
    heads = table([[1, 2], [3, 4], [5, 6]], [[0.5, 0.25], [0.5, 0.25], [0.5, 0.25]])
    other = table([[7], [8]], [[0.375], [0.5]])
    joined = join_tables([(heads, 0), (other, 3)])
    assert joined.tokens[:2].tolist() == [[1, 7, 2], [3, 8, 4]], "of equals, the earlier proposer's"
    assert joined.probabilities.tolist() == [[0.5, 0.375, 0.25], [0.5, 0.5, 0.25], [0.5, 0.25, 0.0]]
    assert joined.proposers[:2].tolist() == [[0, 3, 0], [0, 3, 0]] and joined.tokens[2, :2].tolist() == [5, 6]


def test_one_table_and_none() -> None:
    joined = join_tables([(table([[1, 2]], [[0.5, 0.25]]), 4)])
    assert [part.tolist() for part in joined] == [[[1, 2]], [[0.5, 0.25]], [[4, 4]]]
    assert [part.shape for part in join_tables([])] == [(0, 0)] * 3


def test_more_drafts_than_asked_for_are_cut() -> None:
    class Talkative:
        def extend(self, tokens: list[int]) -> None:
            pass

        def propose(self, most: int) -> tuple[list[int], list[float]]:
            return [1, 2, 3, 4], [1, 0, 1, 0]

    drafted = ask_proposer(Talkative(), 2)
    assert drafted.tokens.tolist() == [1, 2] and drafted.probabilities.tolist() == [1.0, 0.0]
    assert (drafted.tokens.dtype, drafted.probabilities.dtype) == (np.int64, np.float64)
