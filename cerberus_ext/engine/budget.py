"""One budget for texts that are decoded together: which of all their drafts a step verifies.

A forward reads the weights once, whatever it computes, so that the first nodes cost little more than none. The more
texts there are, the more nodes it has without any draft, and the more another one costs of what it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..drafting.gate import ConfidenceGate, Gate
from ..drafting.tree import Tree

# Heads take up to half as long as a node of the model does, for every text, and more for the first. So they are asked
# where a draft for each text makes a step longer by no more than this share.
_HEADS_PAY_BELOW = 0.15
# By so much drafts have to make a step better: what the host does for them is not in the costs.
_MARGIN = 0.03
_MOST = 64  # drafts in a step whose times are looked up once


@dataclass(frozen=True)
class Costs:
    """Time of a step of several texts, in any unit: of straight lines between what is known, going on beyond.

    texts  number of texts -> of a step without drafts
    nodes  nodes of all texts -> what counts is only how much more of them take: the same for any number of texts
    """

    texts: Mapping[int, float]
    nodes: Mapping[int, float]

    def times(self, texts: int, drafts: int) -> NDArray[np.float64]:
        """(drafts + 1,): of steps of so many texts with 0, 1 ... drafts in all."""
        nodes = line(self.nodes, np.arange(texts, texts + drafts + 1))
        return line(self.texts, np.array([texts])) + nodes - nodes[0]


# Where nothing was calibrated: of a model of 135M weights, measured on two threads with AVX-512, 1 being a step of one
# text. In 16 bits it reads half as much, and computes as much. AMX and GPUs: assumed.
_FLOAT32 = Costs({1: 1.0, 8: 1.7}, {1: 1.0, 8: 1.5, 32: 3.8})
_SHORT = Costs(
    {1: 1.0, 2: 1.1, 8: 2.3}, {1: 1.0, 8: 1.9, 9: 2.2, 16: 3.4, 17: 3.75, 24: 5.0, 25: 5.45, 32: 6.6, 33: 7.1}
)
# Of one text, where it is not known whether the weights are read in 16 bits or in four: between what both cost.
_SHORT_ALONE = {1: 1.0, 2: 1.08, 4: 1.25, 6: 1.5, 8: 1.75, 32: 5.0}
_TILES = Costs({1: 1.0, 16: 1.4}, {1: 1.0, 16: 1.3, 32: 1.8})
_GPU = Costs({1: 1.0, 32: 1.1}, {1: 1.0, 32: 1.1, 64: 1.3})


def costs_of(gate: Gate | None, device: torch.device, dtype: torch.dtype) -> Costs:
    """Where no batches were calibrated: of the trees that a gate was calibrated with; beyond these, or without them, an
    assumption about the device."""
    assumed = _assumed(device, dtype)
    if not isinstance(gate, ConfidenceGate) or len(gate.costs) < 2:
        return assumed
    largest = max(gate.costs)
    sizes = [size for size in assumed.nodes if size > largest]
    first, last, *beyond = line(assumed.nodes, np.array([1, largest, *sizes])).tolist()
    unit = max(0.0, gate.costs[largest] - gate.costs[1]) / (last - first)
    further = {size: gate.costs[largest] + unit * (time - last) for size, time in zip(sizes, beyond, strict=True)}
    nodes = gate.costs | further
    return Costs(nodes, nodes)


def costs_of_one(device: torch.device, dtype: torch.dtype) -> Mapping[int, float]:
    """Nodes -> time of a step of one text, where nothing was calibrated."""
    assumed = _assumed(device, dtype)
    return _SHORT_ALONE if assumed is _SHORT else assumed.nodes


def _assumed(device: torch.device, dtype: torch.dtype) -> Costs:
    if device.type != "cpu":
        return _GPU
    if dtype == torch.float32:
        return _FLOAT32
    return _TILES if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else _SHORT


class Terms(NamedTuple):
    """On which each text drafts. asks_heads: whether the heads are asked. least: drafts less likely are of no use."""

    asks_heads: bool
    least: float


ALL = Terms(True, 0.0)  # a text alone, which has its gate


class Budget:
    """Of one decode, whose steps cost `costs`."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._times: dict[int, NDArray[np.float64]] = {}  # by number of texts
        self._terms = {1: ALL}

    def terms(self, texts: int) -> Terms:
        """Of a step of so many texts."""
        if texts not in self._terms:
            times = self.times(texts, max(texts, _MOST))
            # So likely 1, 2, ... drafts have to be on average.
            least = ((1 + _MARGIN) * times[1:] / times[0] - 1) / np.arange(1, len(times)) * texts
            self._terms[texts] = Terms(bool(times[texts] < (1 + _HEADS_PAY_BELOW) * times[0]), float(least.min()))
        return self._terms[texts]

    def times(self, texts: int, drafts: int) -> NDArray[np.float64]:
        """As `Costs.times`, of at least so many drafts."""
        if len(self._times.get(texts, ())) <= drafts:
            self._times[texts] = self._costs.times(texts, max(drafts, _MOST))
        return self._times[texts]

    def share(self, trees: Sequence[Tree]) -> list[Tree]:
        """trees: one of each text, with its drafts -> the same with fewer of them, those with which the step is
        expected to add the most tokens for its time.

        A text alone keeps its tree. So do trees of drafts whose probabilities are not known.
        """
        if len(trees) < 2 or all(tree.size == 1 for tree in trees):
            return list(trees)
        known = [bool(np.isfinite(tree.probabilities).all()) for tree in trees]
        nodes = [1 if weighed else tree.size for tree, weighed in zip(trees, known, strict=True)]
        places = [
            (-probability, text)
            for text, (tree, weighed) in enumerate(zip(trees, known, strict=True))
            if weighed
            for probability in np.minimum.accumulate(tree.probabilities[1:]).tolist()
        ]
        places.sort()  # of a text in the order of its nodes: none is more likely than those before it
        added = np.cumsum([0.0, *(-negative for negative, _ in places)])
        taken = sum(nodes) - len(trees)
        times = self.times(len(trees), taken + len(places))[taken : taken + len(added)]
        worth = (sum(nodes) + added) / times
        worth[0] *= 1 + _MARGIN
        best = int(worth.argmax())
        for _, text in places[:best]:
            nodes[text] += 1
        return [tree.first(count) for tree, count in zip(trees, nodes, strict=True)]


def line(known: Mapping[int, float], sizes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Straight lines between the sizes that are known; beyond, as steeply as the last one, or all of them."""
    at, times = np.array(sorted(known)), np.array([known[size] for size in sorted(known)])
    slopes = [(times[-1] - times[place]) / (at[-1] - at[place]) for place in (0, -2) if len(at) > 1]
    return np.asarray(np.interp(sizes, at, times) + max(0.0, *slopes, 0.0) * np.clip(sizes - at[-1], 0, None))
