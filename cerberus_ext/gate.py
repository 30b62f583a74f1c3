"""Gates: decide at every step whether guessing is worth it, and with which tree.

A gate is asked twice: whether to guess at all, then, knowing the heads' guesses, with which tree. Whatever it answers,
the text stays the same; only the speed changes. To write one, derive from `Gate` and override any of

    opens_at(entropy)    whether, from one number that every step brings along: the host does not wait for it
    opens(hidden)        whether, from the hidden state itself; asked instead of `opens_at`
    choose(tree, ...)    with which tree, from the guesses' log-probabilities

What is not overridden is not asked, and its signals are not brought to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from . import ops
from .tree import DraftTree, expected_accepted


class Gate:
    """Always open, with the tree that `decode` was given. The base of all gates."""

    def trees(self, tree: DraftTree) -> Sequence[DraftTree]:
        """All trees that `choose` may answer with, given decode's own: they tell how many guesses the heads make."""
        return (tree,)

    def opens_at(self, entropy: float) -> bool:
        """entropy: of softmax(hidden), in nats. False: an autoregressive step."""
        return True

    def opens(self, hidden: Tensor) -> bool:
        """hidden (B, D): what the root was chosen from. False: an autoregressive step.

        Reading its values makes the host wait for the device. A later step may write over the tensor.
        """
        return not answers(self, "opens_at") or self.opens_at(ops.hidden_entropy(hidden)[0].item())

    def choose(self, tree: DraftTree, logprobs: Tensor) -> DraftTree | None:
        """tree: decode's own; logprobs (B, K, P) float32 on the host: of the guesses -> the tree to use, or None."""
        return tree


def answers(gate: Gate, question: str) -> bool:
    """Whether a gate has an answer of its own to "opens_at", "opens" or "choose"."""
    return getattr(getattr(gate, question), "__func__", None) is not getattr(Gate, question)


class AlwaysOpen(Gate):
    """Guesses at every step."""


class AlwaysClosed(Gate):
    """Never guesses: plain autoregressive decoding, with the same loop and kernels."""

    def opens(self, hidden: Tensor) -> bool:
        return False


class EntropyGate(Gate):
    """The paper's gate (arXiv 2410.13344): open where the entropy of softmax(hidden) is below `threshold`, in nats."""

    def __init__(self, threshold: float) -> None:
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or threshold != threshold:
            raise TypeError(f"EntropyGate: threshold must be a number, got {threshold!r}")
        self.threshold = float(threshold)

    def opens_at(self, entropy: float) -> bool:
        return entropy < self.threshold


class ConfidenceGate(Gate):
    """Takes the tree that promises the most tokens for its time, or none where no tree beats a plain step.

    costs: tree size -> time of a step with it, size 1 being a plain step; any unit; sizes between are interpolated.
    trees: what to choose from; None: decode's own tree only.
    margin: a tree must promise this much more than a plain step, 0.05 is 5 %.

    A tree of expected accepted length a (from the heads' own probabilities) and cost c gains (1 + a) / c tokens
    per unit of time, a plain step 1 / costs[1].
    """

    def __init__(
        self, costs: Mapping[int, float], trees: Sequence[DraftTree] | None = None, margin: float = 0.0
    ) -> None:
        if 1 not in costs:
            raise ValueError(f"ConfidenceGate: costs must have size 1, a plain step, got sizes {sorted(costs)}")
        for size, cost in costs.items():
            if not cost > 0:
                raise ValueError(f"ConfidenceGate: costs[{size}] must be > 0, got {cost}")
        if not margin >= 0:
            raise ValueError(f"ConfidenceGate: margin must be >= 0, got {margin}")
        if trees is not None and not trees:
            raise ValueError("ConfidenceGate: trees must be None or have at least one tree, got none")
        for tree in trees or ():
            _check_cost(tree, costs)
        self.costs = dict(sorted(costs.items()))
        self.margin = margin
        self._trees = None if trees is None else tuple(trees)

    def trees(self, tree: DraftTree) -> Sequence[DraftTree]:
        if self._trees is not None:
            return self._trees
        _check_cost(tree, self.costs)
        return (tree,)

    def cost(self, size: int) -> float:
        """Time of a step with `size` nodes."""
        return float(np.interp(size, list(self.costs), list(self.costs.values())))

    def choose(self, tree: DraftTree, logprobs: Tensor) -> DraftTree | None:
        probabilities = logprobs[0].exp().tolist()
        best, best_gain = None, (1 + self.margin) / self.cost(1)
        for candidate in self.trees(tree):
            gain = (1 + expected_accepted(candidate, probabilities)) / self.cost(candidate.size)
            if gain > best_gain:
                best, best_gain = candidate, gain
        return best


def _check_cost(tree: DraftTree, costs: Mapping[int, float]) -> None:
    if tree.size > max(costs):
        raise ValueError(
            f"ConfidenceGate: costs must reach the size of every tree, a tree has {tree.size} nodes,"
            f" the largest size with a cost is {max(costs)}"
        )
