"""One budget for texts that are decoded together."""

from __future__ import annotations

import itertools
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, Gate, Signals
from cerberus_ext.drafting.tree import ALONE, Tree, tree_of_ranks
from cerberus_ext.engine.budget import Budget, Costs, Terms, costs_of
from cerberus_ext.engine.loop import propose
from cerberus_ext.runtime.stepper import Stepper

COSTS = Costs({1: 1.0, 4: 1.3, 16: 3.0}, {1: 1.0, 4: 1.3, 16: 3.0})
HALF, CPU = torch.float16, torch.device("cpu")


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
    line = dict(enumerate(np.cumsum([1.0, *slopes]).tolist(), start=1))
    budget = Budget(Costs(line, line))

    def worth(sizes: tuple[int, ...]) -> float:
        tokens = sum(tree.expected_tokens[size - 1] for tree, size in zip(trees, sizes, strict=True))
        return float(tokens / budget.times(len(trees), 12)[sum(sizes) - len(trees)])

    found = tuple(tree.size for tree in budget.share(trees))
    if len(trees) == 1:
        assert found == (trees[0].size,), "a text alone has its gate"
        return
    best = max(map(worth, itertools.product(*(range(1, tree.size + 1) for tree in trees))))
    if sum(found) == len(trees):  # no drafts, where they would gain too little
        assert best <= 1.03 * worth(found) + 1e-9
    else:
        assert worth(found) == pytest.approx(best)
    # What is less likely than the terms ask for is never taken.
    likeliest = max((tree.probabilities[1] for tree in trees if tree.size > 1), default=0.0)
    assert sum(found) == len(trees) or likeliest >= budget.terms(len(trees)).least - 1e-9


def test_fades_as_the_batch_grows() -> None:
    sizes = []
    for texts in (2, 4, 8, 16):
        shared = Budget(COSTS).share([chain(0.7, 0.5, 0.35, 0.2)] * texts)
        sizes.append(sum(tree.size for tree in shared) / texts)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 2 and sizes[-1] < 2


def test_heads_are_not_asked_where_no_draft_of_theirs_pays() -> None:
    budget = Budget(costs_of(None, CPU, HALF))
    asked = [budget.terms(texts).asks_heads for texts in (1, 2, 4, 8)]
    assert asked[0] and not asked[-1] and asked == sorted(asked, reverse=True)
    assert Budget(costs_of(None, torch.device("cuda"), HALF)).terms(16).asks_heads


def test_trees_of_unknown_worth_stay_and_count() -> None:
    static = tree_of_ranks([-1, 0, 0], [0, 0, 1])
    likely, unlikely = chain(0.99), chain(0.01)
    found = Budget(COSTS).share([static, likely, unlikely, ALONE])
    assert [tree.size for tree in found] == [3, 2, 1, 1] and found[0] is static


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_costs_are_a_gates_where_it_has_some(dtype: torch.dtype) -> None:
    """Beyond its sizes they grow as is assumed: a gate of small trees says nothing of large steps."""
    assumed, gate = costs_of(None, CPU, dtype), ConfidenceGate({1: 2.0, 4: 2.6, 8: 4.0})
    for other in (AlwaysOpen(), ConfidenceGate({1: 2.0})):
        assert costs_of(other, CPU, dtype) == assumed
    found = costs_of(gate, CPU, dtype)
    assert found.nodes == found.texts and gate.costs.items() <= found.nodes.items()
    unit = 2.0 / (assumed.nodes[8] - 1.0)
    assert found.nodes[32] == pytest.approx(4.0 + unit * (assumed.nodes[32] - assumed.nodes[8]))


def test_times() -> None:
    """By straight lines, from what so many texts take without drafts on; beyond, as steeply as before."""
    nodes = {1: 5.0, 4: 5.3, 16: 7.0}
    assert Costs({1: 1.0, 4: 3.0}, nodes).times(4, 24)[[0, 6, 12, 24]].tolist() == pytest.approx([3, 3.85, 4.7, 6.4])
    assert Costs({1: 1.0, 4: 3.0}, {1: 2.0}).times(7, 1).tolist() == [5.0, 5.0]


def test_nothing_is_asked_of_texts_whose_drafts_are_too_unlikely() -> None:
    """Their tree is the pending token alone, and the gate is not asked."""

    class Proposer:
        def extend(self, tokens: list[int]) -> None:
            pass

        def propose(self, max_depth: int) -> tuple[list[int], list[float]]:
            return [3, 4], [0.5, 0.9]

    class Asked(Gate):
        needs = frozenset({"expected_tokens"})

        def decide(self, signals: Signals) -> int:
            asked.append(signals.expected_tokens)
            return signals.max_nodes

    asked: list[object] = []
    policy, step = DynamicPolicy(4), cast(Stepper, None)  # nothing of it is read
    trees = policy.begin([Proposer()], 10)
    assert propose(step, policy, Asked(), trees, 3, Terms(False, 0.6)) is ALONE and not asked
    assert propose(step, policy, Asked(), trees, 3, Terms(False, 0.4)).size == 3 and len(asked) == 1
