"""One budget for texts that are decoded together: which of all their drafts a step verifies.

A forward reads the weights once, whatever it computes, so that the first nodes cost little more than none. The more
texts there are, the more nodes it has without any draft, and the more another one costs of what it adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ..drafting.gate import ConfidenceGate, Gate
from ..drafting.tree import Tree

# Time of a step by its nodes, 1 being a step of one, where nothing was calibrated: of a model of 135M weights, measured
# on two threads with AVX-512. In 16 bits it reads half as much, and computes as much. AMX and GPUs: assumed.
_FLOAT32 = {1: 1.0, 8: 1.5, 32: 3.1}
_SHORT = {1: 1.0, 8: 2.35, 32: 6.5}
_TILES = {1: 1.0, 16: 1.3, 32: 1.8}
_GPU = {1: 1.0, 32: 1.1, 64: 1.3}
# Heads take about half as long as a node of the model does, for every text. So they are asked where a node is worth its
# time from a lower probability on than their best drafts mostly have.
_HEADS_PAY_BELOW = 0.34


def costs_of(gate: Gate | None, device: torch.device, dtype: torch.dtype) -> Mapping[int, float]:
    """Time of a step by the nodes of all texts: what a gate was calibrated with, or an assumption about the device."""
    if isinstance(gate, ConfidenceGate) and len(gate.costs) > 1:
        return gate.costs
    if device.type != "cpu":
        return _GPU
    if dtype == torch.float32:
        return _FLOAT32
    return _TILES if dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() else _SHORT


def heads_pay(texts: int, costs: Mapping[int, float]) -> bool:
    """Whether the heads are asked at a step of so many texts; of a single one they always are."""
    if texts < 2:
        return True
    plain, larger = cost(costs, np.array([texts, texts + 1]))
    return bool(larger - plain < _HEADS_PAY_BELOW * plain / texts)


def share(trees: Sequence[Tree], costs: Mapping[int, float]) -> list[Tree]:
    """trees: one of each text, with its drafts -> the same with fewer of them, those with which the step is expected to
    add the most tokens for its time.

    Trees of drafts whose probabilities are not known stay as they are.
    """
    known = [bool(np.isfinite(tree.probabilities).all()) for tree in trees]
    least = sum(1 if weighed else tree.size for tree, weighed in zip(trees, known, strict=True))
    places = [
        (-probability, text)
        for text, (tree, weighed) in enumerate(zip(trees, known, strict=True))
        if weighed
        for probability in np.minimum.accumulate(tree.probabilities[1:]).tolist()
    ]
    places.sort()  # of a text in the order of its nodes: none is more likely than those before it
    added = np.cumsum([0.0, *(-negative for negative, _ in places)])
    best = int(np.argmax((least + added) / cost(costs, least + np.arange(len(added)))))
    nodes = [1 if weighed else tree.size for tree, weighed in zip(trees, known, strict=True)]
    for _, text in places[:best]:
        nodes[text] += 1
    return [tree.first(count) for tree, count in zip(trees, nodes, strict=True)]


def cost(costs: Mapping[int, float], nodes: np.ndarray) -> np.ndarray:
    """By straight lines between the sizes that are known; beyond, as steeply as the last one, or all of them."""
    sizes, times = np.array(sorted(costs)), np.array([costs[size] for size in sorted(costs)])
    slopes = [(times[-1] - times[place]) / (sizes[-1] - sizes[place]) for place in (0, -2) if len(sizes) > 1]
    return np.asarray(np.interp(nodes, sizes, times) + max(0.0, *slopes, 0.0) * np.clip(nodes - sizes[-1], 0, None))
