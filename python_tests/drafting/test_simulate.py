"""What drafting would be worth, from ranks."""

from __future__ import annotations

from cerberus_ext.drafting.simulate import ABSENT, best_paths, conditional_accuracy, tokens_per_step

# Draft ranks of two heads at seven positions of one text; A: absent.
A = ABSENT
RANKS = [[0, 0], [0, 1], [1, A], [0, 0], [A, 0], [2, 0], [0, A]]


def test_best_paths() -> None:
    assert best_paths(RANKS, 9, drafts=2) == [(0,), (0, 0), (1,), (0, 1)]
    assert best_paths(RANKS, 9, drafts=3) == [(0,), (0, 0), (1,), (2,), (0, 1), (2, 0)]
    assert best_paths(RANKS, 2, drafts=3) == [(0,), (0, 0)]


def test_tokens_per_step() -> None:
    # Step at 0 accepts both and goes on at 3, which accepts both and ends at 6, the last: 6 tokens, 2 steps.
    assert tokens_per_step([RANKS], [(0,), (0, 0)]) == 3.0
    # A chain of one: 0 -> 2, 2 -> 3, 3 -> 5, 5 -> 6.
    assert tokens_per_step([RANKS], [(0,)]) == 1.5
    assert tokens_per_step([RANKS], []) == 1.0
    assert tokens_per_step([RANKS, RANKS[:3]], [(0,), (0, 0)]) == 8 / 3


def test_conditional_accuracy() -> None:
    table = conditional_accuracy(RANKS, [(0,)], drafts=2)
    assert table[0] == [round(4 / 7, 6), round(1 / 7, 6)]
    assert table[1] == [0.5, 0.25]  # of the four positions where head 1's best draft was right
