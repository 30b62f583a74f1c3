"""Gates: decide at every step whether drafting is worth it, and with which tree.

A gate is asked twice: whether to draft at all, then, knowing the heads' drafts, with which tree. Whatever it answers,
the text stays the same; only the speed changes. To write one, derive from `Gate` and override any of

    opens_at(entropy)    whether, from one number that every step brings along: the host does not wait for it
    opens(hidden)        whether, from the hidden state itself; asked instead of `opens_at`
    choose(tree, ...)    with which tree, from the drafts' log-probabilities
    choose_size(...)     with how many nodes of a DynamicPolicy's tree, from what they promise; asked instead of
    `choose`

What is not overridden is not asked, and its signals are not brought to the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from .platt import reading
from .static_policy import StaticPolicy


class Gate:
    """Always open, with the tree that `decode` was given. The base of all gates."""

    def trees(self, tree: StaticPolicy) -> Sequence[StaticPolicy]:
        """All trees that `choose` may answer with, given decode's own: they tell how many drafts the heads make."""
        return (tree,)

    def opens_at(self, entropy: float) -> bool:
        """entropy: of softmax(hidden), in nats. False: an autoregressive step."""
        return True

    def opens(self, hidden: Tensor) -> bool:
        """hidden (B, D): what the root was chosen from. False: an autoregressive step.

        Reading its values makes the host wait for the device. A later step may write over the tensor.
        """
        return not answers(self, "opens_at") or self.opens_at(ops.hidden_entropy(hidden)[0].item())

    def choose(self, tree: StaticPolicy, logprobs: Tensor) -> StaticPolicy | None:
        """tree: decode's own; logprobs (B, K, P) float32 on the host: of the drafts -> the tree to use, or None."""
        return tree

    def choose_size(self, expected: NDArray[np.float64]) -> int:
        """expected (N,): [n - 1] is how many tokens a step with the n most likely nodes can be expected to gain -> n.

        1: no drafts.
        """
        return len(expected)

    def check_size(self, size: int) -> None:
        """Raises ValueError where `choose_size` cannot judge trees of up to `size` nodes."""


def answers(gate: Gate, question: str) -> bool:
    """Whether a gate has an answer of its own to "opens_at", "opens", "choose" or "choose_size"."""
    return getattr(getattr(gate, question), "__func__", None) is not getattr(Gate, question)


def wants_draft_trees(gate: Gate) -> bool:
    """Whether a gate chooses among StaticPolicies, and cannot choose the size of a DynamicPolicy's tree."""
    if isinstance(gate, ConfidenceGate):
        return gate.own_trees is not None
    return answers(gate, "choose") and not answers(gate, "choose_size")


class AlwaysOpen(Gate):
    """Drafts at every step."""


class AlwaysClosed(Gate):
    """Never drafts: plain autoregressive decoding, with the same loop and kernels."""

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
    trees: what to choose from; None: decode's own tree, or, of a DynamicPolicy's tree, how many nodes.
    margin: a tree must promise this much more than a plain step, 0.05 is 5 %; with `rate`: this many tokens more.
    rate: tokens that decoding gains per unit of time on the whole; None: not known.
    platt: (slope, shift) of every head, where its probabilities p are to be read as
        sigmoid(slope * logit(p) + shift); None: as they are. For a DynamicPolicy its own platt
        count.

    A tree of expected accepted length a (from the heads' probabilities) and cost c gains (1 + a) / c tokens per unit
    of time, a plain step 1 / costs[1]; the largest quotient wins. That is best for the step, but not for the text:
    where the heads are certain, a large tree is worth more than its quotient says, since the time that it saves is
    spent at `rate`. With a rate, the largest (1 + a) - rate * c wins instead, which is best for the text where steps
    do not depend on each other.
    """

    def __init__(
        self,
        costs: Mapping[int, float],
        trees: Sequence[StaticPolicy] | None = None,
        margin: float = 0.0,
        rate: float | None = None,
        platt: Sequence[tuple[float, float]] | None = None,
    ) -> None:
        if 1 not in costs:
            raise ValueError(f"ConfidenceGate: costs must have size 1, a plain step, got sizes {sorted(costs)}")
        for size, cost in costs.items():
            if not cost > 0:
                raise ValueError(f"ConfidenceGate: costs[{size}] must be > 0, got {cost}")
        if not margin >= 0:
            raise ValueError(f"ConfidenceGate: margin must be >= 0, got {margin}")
        if rate is not None and not rate > 0:
            raise ValueError(f"ConfidenceGate: rate must be None or > 0, got {rate}")
        if trees is not None and not trees:
            raise ValueError("ConfidenceGate: trees must be None or have at least one tree, got none")
        self.costs = dict(sorted(costs.items()))
        for tree in trees or ():
            self.check_size(tree.size)
        self.margin = margin
        self.rate = rate
        self.platt = None if platt is None else tuple((float(a), float(b)) for a, b in platt)
        self.own_trees = None if trees is None else tuple(trees)
        self._read = reading(self.platt)
        self._prospect: _Prospect | None = None  # of the trees that were last asked for
        self._sizes: dict[int, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}  # by nodes: sizes, their costs

    def trees(self, tree: StaticPolicy) -> Sequence[StaticPolicy]:
        if self.own_trees is not None:
            return self.own_trees
        self.check_size(tree.size)
        return (tree,)

    def check_size(self, size: int) -> None:
        if size > max(self.costs):
            raise ValueError(
                f"ConfidenceGate: costs must reach the size of every tree, a tree has {size} nodes,"
                f" the largest size with a cost is {max(self.costs)}"
            )

    def cost(self, size: int) -> float:
        """Time of a step with `size` nodes."""
        return float(np.interp(size, list(self.costs), list(self.costs.values())))

    def choose(self, tree: StaticPolicy, logprobs: Tensor) -> StaticPolicy | None:
        trees, prospect = tuple(self.trees(tree)), self._prospect
        if prospect is None or prospect.trees != trees:
            prospect = _Prospect(trees, [self.cost(1), *(self.cost(one.size) for one in trees)])
            self._prospect = prospect
        best = self._best(prospect.tokens(self._probabilities(logprobs[0])), prospect.costs)
        return trees[best - 1] if best else None

    def choose_size(self, expected: NDArray[np.float64]) -> int:
        """One of the sizes that have a cost, or all of the nodes."""
        nodes = len(expected)
        if nodes not in self._sizes:
            sizes = np.array([*(size for size in self.costs if size < nodes), nodes])
            self._sizes[nodes] = sizes, np.array([self.cost(int(size)) for size in sizes])
        sizes, costs = self._sizes[nodes]
        return int(sizes[self._best(expected[sizes - 1], costs)])

    def _best(self, tokens: NDArray[np.float64], costs: NDArray[np.float64]) -> int:
        """The index of the best of several steps, the first of which is a plain one; of equals, the first."""
        if self.rate is None:
            worth = tokens / costs
            worth[0] *= 1 + self.margin
        else:
            worth = tokens - self.rate * costs
            worth[0] += self.margin
        return int(worth.argmax())

    def _probabilities(self, logprobs: Tensor) -> np.ndarray:
        """logprobs (K, P) -> (K, P) float64: how likely every draft is right, where those before it are."""
        return self._read(logprobs.cpu().numpy().astype(np.float64))


class _Prospect:
    """What trees promise, computed for all of them at once: it is asked at every step.

    costs (1 + T,): of a plain step and of each tree.
    """

    def __init__(self, trees: tuple[StaticPolicy, ...], costs: Sequence[float]) -> None:
        self.trees = trees
        self.costs = np.array(costs)
        paths = sorted({path for tree in trees for path in tree.paths()})
        place = {path: i for i, path in enumerate(paths)}
        longest = max(map(len, paths), default=0)
        # A path's drafts as (head, rank); a shorter path is filled up with head -1, the certain one.
        heads = [[*range(len(path)), *[-1] * (longest - len(path))] for path in paths]
        ranks = [[*path, *[0] * (longest - len(path))] for path in paths]
        shape = (len(paths), longest)
        self._heads, self._ranks = (np.array(part, dtype=np.intp).reshape(shape) for part in (heads, ranks))
        self._in_tree = np.zeros((1 + len(trees), len(paths)))
        for row, tree in enumerate(trees, start=1):
            self._in_tree[row, [place[path] for path in tree.paths()]] = 1

    def tokens(self, probabilities: np.ndarray) -> np.ndarray:
        """probabilities (K, P) -> (1 + T,) tokens to expect of a plain step and of a step with each tree.

        A node is accepted when its whole path is right, so a tree gains, over the plain step's one token, the sum over
        its nodes of the product along the path.
        """
        heads, drafts = probabilities.shape
        table = np.ones((heads + 1, drafts))
        table[:heads] = probabilities
        along = table[self._heads, self._ranks]  # (nodes, longest)
        return 1 + self._in_tree @ np.multiply.reduce(along, axis=-1)
