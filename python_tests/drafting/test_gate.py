"""What gates answer, and every way to make a wrong one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate, answers
from cerberus_ext.drafting.platt import corrected
from cerberus_ext.drafting.static_policy import StaticPolicy

HIDDEN = torch.zeros(1, 8)  # uniform: entropy log 8
CHAIN, WIDE = StaticPolicy.chain(2), StaticPolicy.from_widths([4, 2])
COSTS = {1: 1.0, 3: 1.2, 13: 1.8}


def logprobs(*best: float) -> torch.Tensor:
    """(1, K, 4): what every head thinks of its best draft; the others are at 2 %."""
    rows = [[p, 0.02, 0.02, 0.02] for p in best]
    return torch.tensor([rows]).log()


@pytest.mark.parametrize(("gate", "opens"), [(Gate(), True), (AlwaysOpen(), True), (AlwaysClosed(), False)])
def test_always(gate: Gate, opens: bool) -> None:
    assert gate.opens(HIDDEN) is opens
    assert gate.choose(CHAIN, logprobs(0.1, 0.1)) is CHAIN and list(gate.trees(CHAIN)) == [CHAIN]


@pytest.mark.parametrize(("threshold", "opens"), [(math.log(8) - 0.01, False), (math.log(8) + 0.01, True)])
def test_entropy(threshold: float, opens: bool, device: str) -> None:
    assert EntropyGate(threshold).opens(HIDDEN.to(device)) is opens
    assert EntropyGate(threshold).opens_at(math.log(8)) is opens


def test_what_a_gate_answers() -> None:
    """So that it is asked nothing else, on classes and on single gates."""

    class Own(EntropyGate):
        def opens(self, hidden: torch.Tensor) -> bool:
            return False

    patched = Gate()
    patched.choose = lambda tree, logprobs: None
    questions = ("opens_at", "opens", "choose")
    gates = [Gate(), AlwaysOpen(), AlwaysClosed(), EntropyGate(1.0), ConfidenceGate(COSTS), Own(1.0), patched]
    found = [[question for question in questions if answers(gate, question)] for gate in gates]
    assert found == [[], [], ["opens"], ["opens_at"], ["choose"], ["opens_at", "opens"], ["choose"]]


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        ((0.9, 0.9), CHAIN),  # (1 + .9 + .81) / 1.2 = 2.26; WIDE: (1 + .96 + .88) / 1.8 = 1.6
        ((0.05, 0.05), None),  # (1 + .05 + .0025) / 1.2 < 1
    ],
)
def test_confidence(best: tuple[float, ...], expected: StaticPolicy | None, device: str) -> None:
    gate = ConfidenceGate(COSTS, [CHAIN, WIDE])
    assert list(gate.trees(StaticPolicy.root())) == [CHAIN, WIDE]
    assert gate.choose(StaticPolicy.root(), logprobs(*best).to(device)) is expected


def test_confidence_takes_the_wide_tree_where_drafts_are_alike() -> None:
    alike = torch.full((1, 2, 4), math.log(0.25))
    # CHAIN: (1 + .25 + .0625) / 1.2 = 1.09; WIDE: (1 + 1 + .5) / 1.8 = 1.39
    assert ConfidenceGate(COSTS, [CHAIN, WIDE]).choose(CHAIN, alike) is WIDE
    assert ConfidenceGate(COSTS).choose(CHAIN, alike) is CHAIN, "without trees of its own: decode's"
    assert ConfidenceGate(COSTS, margin=0.5).choose(CHAIN, alike) is None


def test_confidence_weighs_every_node_of_a_tree() -> None:
    #        0
    #      / | \        ranks  0 1 3
    #     1  2  3
    #    / \    |             0 2   0
    #   4   5   6
    #           |                   1
    #           7
    drawn = StaticPolicy(parents=(-1, 0, 0, 0, 1, 1, 3, 6), ranks=(0, 0, 1, 3, 0, 2, 0, 1))
    probabilities = torch.tensor([[[0.5, 0.25, 0, 0.125], [0.5, 0, 0.25, 0], [0, 1.0, 0, 0]]])
    # 1 .5  2 .25  3 .125  4 .25  5 .125  6 .0625  7 .0625: 1.375 accepted drafts are expected
    for cost, expected in ((2.37, drawn), (2.38, None)):
        gate = ConfidenceGate({1: 1.0, 8: cost}, [StaticPolicy.root(), drawn])
        assert gate.choose(CHAIN, probabilities.log()) is expected
        assert ConfidenceGate({1: 1.0, 8: cost}).choose(drawn, probabilities.log()) is expected


def test_confidence_with_a_rate_weighs_what_time_is_worth() -> None:
    """CHAIN: 2.71 tokens in 1.2, WIDE: 2.84 in 1.3: CHAIN has the better quotient, but 0.1 of time may cost less."""
    costs = {1: 1.0, 3: 1.2, 13: 1.3}
    expected = {None: CHAIN, 0.8: WIDE, 1.5: CHAIN, 9.0: None}
    for rate, tree in expected.items():
        assert ConfidenceGate(costs, [CHAIN, WIDE], rate=rate).choose(CHAIN, logprobs(0.9, 0.9)) is tree
    assert ConfidenceGate(costs, [CHAIN], rate=1.0, margin=1.6).choose(CHAIN, logprobs(0.9, 0.9)) is None
    assert ConfidenceGate(costs, [CHAIN], rate=1.0, margin=1.4).choose(CHAIN, logprobs(0.9, 0.9)) is CHAIN


def test_corrections_are_those_of_each_head() -> None:
    probabilities = np.array([[0.5, 0.2], [0.5, 0.2]])
    none, both = np.zeros((2, 1)), np.array([[2.0], [1.0]])
    assert corrected(np.log(probabilities), none + 1, none) == pytest.approx(probabilities)
    # logit 0.2 = log 1/4: doubled log 1/16; shifted by log 4, log 1
    found = corrected(np.log(probabilities), both, np.array([[0.0], [math.log(4)]]))
    assert found == pytest.approx(np.array([[0.5, 1 / 17], [0.8, 0.5]]))
    assert np.isfinite(corrected(np.array([[-math.inf, -1e6, 0.0]] * 2), both, none)).all()
    gate = ConfidenceGate(COSTS, [CHAIN], platt=[(1.0, -6.0), (1.0, 0.0)])
    assert gate.choose(CHAIN, logprobs(0.9, 0.9)) is None


def test_costs_between_are_interpolated() -> None:
    gate = ConfidenceGate({13: 1.8, 1: 1.0, 3: 1.2})
    assert gate.cost(8) == pytest.approx(1.5) and gate.cost(1) == 1.0


WRONG = [
    (lambda: EntropyGate("low"), TypeError, "EntropyGate: threshold must be a number, got 'low'"),
    (lambda: EntropyGate(float("nan")), TypeError, "EntropyGate: threshold must be a number, got nan"),
    (lambda: ConfidenceGate({2: 1.0}), ValueError, r"costs must have size 1, a plain step, got sizes \[2\]"),
    (lambda: ConfidenceGate({1: 0.0}), ValueError, r"costs\[1\] must be > 0, got 0.0"),
    (lambda: ConfidenceGate(COSTS, []), ValueError, "trees must be None or have at least one tree, got none"),
    (lambda: ConfidenceGate(COSTS, [CHAIN], -0.1), ValueError, "margin must be >= 0, got -0.1"),
    (lambda: ConfidenceGate(COSTS, rate=0.0), ValueError, "rate must be None or > 0, got 0.0"),
    (lambda: ConfidenceGate(COSTS, [StaticPolicy.chain(20)]), ValueError, "a tree has 21 nodes, the largest .* is 13"),
    (
        lambda: ConfidenceGate(COSTS).choose(StaticPolicy.chain(20), logprobs(*[0.5] * 20)),
        ValueError,
        "a tree has 21 nodes, the largest size with a cost is 13",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
