"""Gates: decide at every step whether drafting is worth it, and with how many nodes.

Whatever a gate answers, the text stays the same; only the speed changes. To write one, derive from `Gate`, name in
`needs` the signals that it reads, and override `decide`:

    class Rarely(Gate):
        needs = frozenset({"entropy"})

        def decide(self, signals):
            return signals.max_nodes if signals.entropy < 2.0 else 0

What no gate needs is not brought to the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..io.checks import check_integer, check_number


@dataclass(frozen=True)
class Signals:
    """What a gate may read of a step. All but max_nodes are None where it does not need them.

    max_nodes        of the largest tree that the policy makes
    hidden           (B, D), on the device: what the pending token was chosen from. Reading its values makes the host
                     wait for the device; a later step may write over it
    entropy          of softmax(hidden), in nats: every step brings it along, the host does not wait for it
    expected_tokens  (N,): [n - 1] is how many tokens a step with the n best nodes is expected to add. For it the heads
                     have to draft
    """

    max_nodes: int
    hidden: Tensor | None = None
    entropy: float | None = None
    expected_tokens: NDArray[np.float64] | None = None


SIGNALS = frozenset({"hidden", "entropy", "expected_tokens"})


class Gate:
    """Always open. The base of all gates.

    needs: names of the Signals that `decide` reads.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def decide(self, signals: Signals) -> int:
        """How many nodes this step's tree is to have, the best ones; 0 or 1: no drafts."""
        return signals.max_nodes


class AlwaysOpen(Gate):
    """Drafts at every step."""


class AlwaysClosed(Gate):
    """Never drafts: plain autoregressive decoding, with the same loop and kernels."""

    def decide(self, signals: Signals) -> int:
        return 0


class EntropyGate(Gate):
    """The paper's gate (arXiv 2410.13344): open where the entropy of softmax(hidden) is below `threshold`, in nats."""

    needs = frozenset({"entropy"})

    def __init__(self, threshold: float) -> None:
        self.threshold = check_number("EntropyGate: threshold", threshold)

    def decide(self, signals: Signals) -> int:
        assert signals.entropy is not None
        return signals.max_nodes if signals.entropy < self.threshold else 0


class ConfidenceGate(Gate):
    """Takes as many nodes as are expected to add the most tokens for their time, or none where no tree beats a plain
    step.

    costs: nodes -> time of a step with them, 1 being a plain step; any unit; sizes between are interpolated.
    margin: a tree must be expected to add this much more than a plain step, 0.05 is 5 %; with `rate`: so many tokens
        more.
    rate: tokens that decoding adds per unit of time on the whole; None: not known.

    A tree that is expected to add t tokens at cost c adds t / c per unit of time, a plain step 1 / costs[1]; the
    largest quotient wins. That is best for the step, but not for the text: where the heads are certain, a large tree is
    worth more than its quotient says, since the time that it saves is spent at `rate`. With a rate, the largest
    t - rate * c wins instead, which is best for the text where steps do not depend on each other.
    """

    needs = frozenset({"expected_tokens"})

    def __init__(self, costs: Mapping[int, float], margin: float = 0.0, rate: float | None = None) -> None:
        if not isinstance(costs, Mapping):
            raise TypeError(f"ConfidenceGate: costs must be a mapping, nodes -> time, got {type(costs).__name__}")
        for size, cost in costs.items():
            check_integer("ConfidenceGate: costs: a size", size, 1)
            check_number(f"ConfidenceGate: costs[{size}]", cost, "> 0", lambda number: number > 0)
        if 1 not in costs:
            raise ValueError(f"ConfidenceGate: costs must have size 1, a plain step, got sizes {sorted(costs)}")
        self.costs = dict(sorted(costs.items()))
        self._sizes, self._times = np.array(list(self.costs)), np.array(list(self.costs.values()))
        self.margin = check_number("ConfidenceGate: margin", margin, ">= 0", lambda number: number >= 0)
        if rate is not None:
            check_number("ConfidenceGate: rate", rate, "None or > 0", lambda number: number > 0)
        self.rate = rate

    def cost(self, sizes: Any) -> Any:
        """Time of steps with so many nodes: a number, or an array for an array of them."""
        return np.interp(sizes, self._sizes, self._times)

    def check_size(self, max_nodes: int) -> None:
        """Raises ValueError where a policy's largest tree, of max_nodes, is larger than any size with a cost."""
        if max_nodes > self._sizes[-1]:
            raise ValueError(
                f"ConfidenceGate: costs must reach the size of every tree, a tree has {max_nodes} nodes,"
                f" the largest size with a cost is {self._sizes[-1]}"
            )

    def decide(self, signals: Signals) -> int:
        """One of the sizes that have a cost, or all of the nodes. Raises ValueError as `check_size`."""
        self.check_size(signals.max_nodes)
        assert signals.expected_tokens is not None
        nodes = len(signals.expected_tokens)
        sizes = np.array([*(size for size in self.costs if size < nodes), nodes])
        tokens, costs = signals.expected_tokens[sizes - 1], self.cost(sizes)
        if self.rate is None:
            worth = tokens / costs
            worth[0] *= 1 + self.margin
        else:
            worth = tokens - self.rate * costs
            worth[0] += self.margin
        return int(sizes[worth.argmax()])  # of equals the smallest
