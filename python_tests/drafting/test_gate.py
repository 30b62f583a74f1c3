"""What gates answer, and every way to make a wrong one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from cerberus_ext.drafting.platt import corrected

COSTS = {1: 1.0, 3: 1.2, 13: 1.8}


def expecting(*probabilities: float, max_nodes: int = 13) -> Signals:
    """A step whose best nodes, behind the pending token, are accepted with these probabilities."""
    return Signals(max_nodes, expected_tokens=np.cumsum([1.0, *probabilities]))


def chain(probability: float) -> Signals:
    """3 nodes, one behind the other."""
    return expecting(probability, probability**2)


def wide(probability: float, alike: int = 12) -> Signals:
    return expecting(*[probability] * alike)


@pytest.mark.parametrize(("gate", "nodes"), [(Gate(), 9), (AlwaysOpen(), 9), (AlwaysClosed(), 0)])
def test_always(gate: Gate, nodes: int) -> None:
    assert gate.decide(Signals(9)) == nodes and gate.needs == frozenset()


@pytest.mark.parametrize(("entropy", "nodes"), [(2.09, 0), (2.08, 0), (2.07, 9)])
def test_entropy(entropy: float, nodes: int) -> None:
    gate = EntropyGate(2.08)
    assert gate.needs == {"entropy"} and gate.decide(Signals(9, entropy=entropy)) == nodes


@pytest.mark.parametrize(
    ("signals", "nodes"),
    [
        (chain(0.9), 3),  # (1 + .9 + .81) / 1.2 = 2.26
        (chain(0.05), 1),  # (1 + .05 + .0025) / 1.2 < 1
        (wide(0.125), 13),  # 2.5 / 1.8 = 1.39; 3 nodes: 1.25 / 1.2 = 1.04
        (expecting(0.9, 0.81, *[0.001] * 10), 3),
        (expecting(0.9), 2),  # all there are: 1.9 / 1.1
        (expecting(), 1),
    ],
)
def test_confidence(signals: Signals, nodes: int) -> None:
    gate = ConfidenceGate(COSTS)
    assert gate.needs == {"expected_tokens"} and gate.decide(signals) == nodes


def test_confidence_with_a_margin() -> None:
    assert ConfidenceGate(COSTS, margin=0.38).decide(wide(0.125)) == 13
    assert ConfidenceGate(COSTS, margin=0.4).decide(wide(0.125)) == 1


def test_confidence_weighs_every_node() -> None:
    signals = expecting(0.5, 0.25, 0.125, 0.25, 0.125, 0.0625, 0.0625, max_nodes=8)  # 2.375 tokens
    for cost, nodes in ((2.37, 8), (2.38, 1)):
        assert ConfidenceGate({1: 1.0, 8: cost}).decide(signals) == nodes


def test_confidence_with_a_rate_weighs_what_time_is_worth() -> None:
    """3 nodes: 2.71 tokens in 1.2, 13: 2.84 in 1.3. 3 has the better quotient, but 0.1 of time may cost less."""
    costs, signals = {1: 1.0, 3: 1.2, 13: 1.3}, expecting(0.9, 0.81, *[0.013] * 10)
    for rate, nodes in {None: 3, 0.8: 13, 1.5: 3, 9.0: 1}.items():
        assert ConfidenceGate(costs, rate=rate).decide(signals) == nodes
    assert ConfidenceGate({1: 1.0, 3: 1.2}, rate=1.0, margin=1.6).decide(expecting(0.9, 0.81, max_nodes=3)) == 1
    assert ConfidenceGate({1: 1.0, 3: 1.2}, rate=1.0, margin=1.4).decide(expecting(0.9, 0.81, max_nodes=3)) == 3


def test_of_equals_the_smallest() -> None:
    assert ConfidenceGate({1: 1.0, 3: 2.0, 5: 4.0}).decide(expecting(0.5, 0.5, 1, 1, max_nodes=5)) == 1
    assert ConfidenceGate({1: 1.0, 3: 1.0, 5: 2.0}).decide(expecting(0.5, 0.5, 1, 1, max_nodes=5)) == 3


def test_corrections_are_those_of_each_head() -> None:
    probabilities = np.array([[0.5, 0.2], [0.5, 0.2]])
    none, both = np.zeros((2, 1)), np.array([[2.0], [1.0]])
    assert corrected(np.log(probabilities), none + 1, none) == pytest.approx(probabilities)
    # logit 0.2 = log 1/4: doubled log 1/16; shifted by log 4, log 1
    found = corrected(np.log(probabilities), both, np.array([[0.0], [math.log(4)]]))
    assert found == pytest.approx(np.array([[0.5, 1 / 17], [0.8, 0.5]]))
    assert np.isfinite(corrected(np.array([[-math.inf, -1e6, 0.0]] * 2), both, none)).all()


def test_costs_between_are_interpolated() -> None:
    gate = ConfidenceGate({13: 1.8, 1: 1.0, 3: 1.2})
    assert gate.cost(8) == pytest.approx(1.5) and gate.cost(1) == 1.0


WRONG: list[tuple[Any, type[Exception], str]] = [
    (lambda: EntropyGate("low"), TypeError, "EntropyGate: threshold must be a number, got 'low'"),
    (lambda: EntropyGate(float("nan")), TypeError, "EntropyGate: threshold must be a number, got nan"),
    (lambda: ConfidenceGate({2: 1.0}), ValueError, r"costs must have size 1, a plain step, got sizes \[2\]"),
    (lambda: ConfidenceGate([1.0]), TypeError, "costs must be a mapping, nodes -> time, got list"),
    (lambda: ConfidenceGate({1: 1.0, "8": 2.0}), TypeError, "costs: a size must be an integer, got '8'"),
    (lambda: ConfidenceGate({1: 1.0, 2.5: 2.0}), TypeError, "costs: a size must be an integer, got 2.5"),
    (lambda: ConfidenceGate({1: 1.0, 0: 0.1}), ValueError, "costs: a size must be >= 1, got 0"),
    (lambda: ConfidenceGate({1: 0.0}), ValueError, r"costs\[1\] must be > 0, got 0.0"),
    (lambda: ConfidenceGate({1: float("nan")}), ValueError, r"costs\[1\] must be > 0, got nan"),
    (lambda: ConfidenceGate({1: "a"}), TypeError, r"costs\[1\] must be a number, got 'a'"),
    (lambda: ConfidenceGate(COSTS, -0.1), ValueError, "margin must be >= 0, got -0.1"),
    (lambda: ConfidenceGate(COSTS, rate=0.0), ValueError, "rate must be None or > 0, got 0.0"),
    (
        lambda: ConfidenceGate(COSTS).decide(expecting(0.5, max_nodes=21)),
        ValueError,
        "a tree has 21 nodes, the largest size with a cost is 13",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
