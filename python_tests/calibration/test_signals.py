"""AUC, reliability and the correction of probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memorized import hand_made

from cerberus_ext.calibration.signals import at_every_place, auc, by_quantile, fit_platt, head_reliability, reliability
from cerberus_ext.calibration.trace import TracedText
from cerberus_ext.drafting.conditional import BoundConditional
from cerberus_ext.drafting.platt import corrected
from cerberus_ext.drafting.simulate import ABSENT


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=40))
def test_auc_counts_pairs(places: list[tuple[int, bool]]) -> None:
    hits = [signal for signal, hit in places if hit]
    misses = [signal for signal, hit in places if not hit]
    found = auc([signal for signal, _ in places], [hit for _, hit in places])
    if not hits or not misses:
        assert math.isnan(found)
    else:
        right = sum((a > b) + 0.5 * (a == b) for a in hits for b in misses)
        assert found == pytest.approx(right / (len(hits) * len(misses)))


def test_by_quantile() -> None:
    mean, length = by_quantile([3, 1, 2, 0], [30, 10, 20, 0])
    assert (mean, length) == ([0, 1, 2, 3], [0, 10, 20, 30]), "fewer places than groups"
    mean, length = by_quantile(list(range(100)), [0] * 50 + [2] * 50)
    assert len(mean) == 10 and mean[0] == 4.5 and length == [0] * 5 + [2] * 5


def test_reliability() -> None:
    mean, share, error = reliability([0.05, 0.05, 0.85, 1.0], [False, True, True, True])
    assert mean == pytest.approx([0.05, 0.85, 1.0]) and share == [0.5, 1, 1]
    assert error == pytest.approx((2 * 0.45 + 0.15 + 0) / 4)


def texts(logprobs: np.ndarray, ranks: list[list[int]]) -> list[TracedText]:
    return [hand_made(ranks, logprobs=torch.from_numpy(logprobs))]


def overconfident(places: int) -> tuple[np.ndarray, list[list[int]]]:
    """Two heads of three drafts; what they say is sharper than what happens, by a known slope and shift."""
    random = np.random.default_rng(0)
    said = random.dirichlet([1.0, 0.6, 0.3, 0.6], size=(places, 2))[:, :, :3]
    said = -np.sort(-said, axis=-1)
    true = corrected(np.log(said), np.array([[0.6], [1.5]]), np.array([[-0.4], [0.3]]))
    ranks = []
    for row in true:
        draws = random.random(2)
        edges = row.cumsum(-1)
        ranks.append([int(np.searchsorted(e, d)) if d < e[-1] else ABSENT for e, d in zip(edges, draws, strict=True)])
    return np.log(said), ranks


def test_fitted_corrections_make_probabilities_honest() -> None:
    logprobs, ranks = overconfident(6000)
    found = fit_platt(texts(logprobs[:3000], ranks[:3000]))
    assert found[0][0] < 0.8 and found[1][0] > 1.1
    before = head_reliability(texts(logprobs[3000:], ranks[3000:]), None)
    after = head_reliability(texts(logprobs[3000:], ranks[3000:]), found)
    for (_, _, raw), (_, _, fixed) in zip(before, after, strict=True):
        assert fixed < raw / 2 and fixed < 0.05


def test_the_second_head_counts_where_the_first_is_right() -> None:
    """Where it is not, the second head may say what it likes."""
    logprobs = np.log(np.full((400, 2, 1), 0.5))
    ranks = [[0, 0]] * 150 + [[0, ABSENT]] * 50 + [[ABSENT, ABSENT]] * 200
    (slope, shift), (slope2, shift2) = fit_platt(texts(logprobs, ranks))
    first, second = (1 / (1 + math.exp(-b)) for b in (shift, shift2))  # logit 0.5 is 0: the slope has no say
    assert first == pytest.approx(0.5, abs=0.01) and second == pytest.approx(0.75, abs=0.01)
    assert slope == slope2 == pytest.approx(1.0)
    errors = [error for _, _, error in head_reliability(texts(logprobs, ranks), None)]
    assert errors == pytest.approx([0.0, 0.25])


def test_few_places_change_little() -> None:
    """One place for the first head, none for the second, which is left as it is."""
    (slope, shift), second = fit_platt(texts(np.log(np.full((1, 2, 1), 0.9)), [[ABSENT, ABSENT]]))
    assert abs(slope - 1) < 1 and -1 < shift < 0
    assert second == (1.0, 0.0)


def test_always_right_stays_finite() -> None:
    logprobs = np.log(np.full((500, 1, 1), 0.999))
    ((slope, shift),) = fit_platt(texts(logprobs, [[0]] * 500))
    assert 0 < slope < 5 and abs(shift) < 5


def test_conditional_drafts_count_as_they_are_after_the_right_token() -> None:
    """Sorted anew: where the token before speaks for a late draft, it is the first one."""
    torch.manual_seed(0)
    tables = (torch.randn(1, 20, 3).bfloat16(), torch.randn(20, 3).bfloat16(), torch.ones(1), torch.zeros(1))
    weighs = BoundConditional((*tables, torch.arange(20)))
    ranks = [[2, 1], [0, 3], [ABSENT, 0], [1, ABSENT]]
    ids, logprobs = torch.stack([torch.randperm(20)[:8].view(2, 4) for _ in ranks]), torch.randn(4, 2, 4) / 3 - 2
    logprobs = logprobs.sort(-1, descending=True).values
    text = hand_made(ranks, ids=ids, logprobs=logprobs, conditional=weighs)
    found, new, counts = at_every_place([text])
    assert counts.tolist() == [[True, True], [True, True], [True, False], [True, True]]
    assert found[:, 0] == pytest.approx(logprobs[:, 0].numpy()) and [row[0] for row in new] == [2, 0, ABSENT, 1]
    after = weighs.rerank(ids, logprobs)[:, 0].numpy()  # (places, parent, child)
    for place, (first, second) in enumerate(ranks):
        if first == ABSENT:
            continue
        row = after[place, first]
        assert found[place, 1] == pytest.approx(np.sort(row)[::-1])
        assert new[place][1] == (ABSENT if second == ABSENT else (row > row[second]).sum())
    assert len(fit_platt([text])) == 2 and len(head_reliability([text], None)) == 2
