"""One budget for texts that are decoded together."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate
from cerberus_ext.drafting.tree import ALONE, Tree, tree_of_ranks
from cerberus_ext.engine.budget import cost, costs_of, heads_pay, share

COSTS = {1: 1.0, 4: 1.3, 16: 3.0}


def chain(*probabilities: float) -> Tree:
    """Whose nodes are as likely as that."""
    parents = np.arange(len(probabilities) + 1) - 1
    zeros = np.zeros(len(parents), np.int64)
    return Tree(parents, zeros, zeros, np.array([1.0, *probabilities]))


@given(
    st.lists(st.lists(st.floats(0, 1), max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 1), min_size=4, max_size=20),
)
def test_no_other_choice_is_expected_to_be_faster(drafts: list[list[float]], slopes: list[float]) -> None:
    trees = [chain(*sorted(part, reverse=True)) for part in drafts]
    costs = dict(enumerate(np.cumsum([1.0, *slopes]).tolist(), start=1))

    def worth(sizes: tuple[int, ...]) -> float:
        tokens = sum(tree.expected_tokens[size - 1] for tree, size in zip(trees, sizes, strict=True))
        return float(tokens / cost(costs, np.array(sum(sizes))))

    found = tuple(tree.size for tree in share(trees, costs))
    best = max(map(worth, itertools.product(*(range(1, tree.size + 1) for tree in trees))))
    assert worth(found) == pytest.approx(best)


def test_fades_as_the_batch_grows() -> None:
    sizes = []
    for texts in (1, 2, 4, 8, 16):
        shared = share([chain(0.7, 0.5, 0.35, 0.2)] * texts, COSTS)
        sizes.append(sum(tree.size for tree in shared) / texts)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 and sizes[-1] < 2


def test_heads_are_not_asked_where_no_draft_of_theirs_pays() -> None:
    asked = [heads_pay(texts, costs_of(None, torch.device("cpu"), torch.float16)) for texts in (1, 2, 4, 8)]
    assert asked[0] and not asked[-1] and asked == sorted(asked, reverse=True)
    assert heads_pay(32, costs_of(None, torch.device("cuda"), torch.float16))


def test_trees_of_unknown_worth_stay_and_count() -> None:
    static = tree_of_ranks([-1, 0, 0], [0, 0, 1])
    likely, unlikely = chain(0.99), chain(0.01)
    found = share([static, likely, unlikely, ALONE], COSTS)
    assert [tree.size for tree in found] == [3, 2, 1, 1] and found[0] is static


def test_costs_are_a_gates_where_it_has_some() -> None:
    cpu = torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16):
        assert costs_of(ConfidenceGate(COSTS), cpu, dtype) == COSTS
        assumed = costs_of(AlwaysOpen(), cpu, dtype)
        assert assumed == costs_of(None, cpu, dtype) == costs_of(ConfidenceGate({1: 2.0}), cpu, dtype) != COSTS
    assert cost(COSTS, np.array([1, 4, 10, 16, 28])).tolist() == pytest.approx([1, 1.3, 2.15, 3, 4.7])
    assert cost({1: 2.0}, np.array([5])).tolist() == [2.0]
