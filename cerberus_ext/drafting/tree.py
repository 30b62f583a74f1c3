"""What one step verifies (Tree), what makes the trees of one text (Trees), and who decides it (TreePolicy)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _host
from .proposers import HeadsSignals, Proposer, ProposerFactory

MAX_NODES = 1024  # of a tree that policies make: far beyond what is ever fastest
HEADS = 0  # the heads' number among the proposers; decode's `proposers` follow


class TreeTensors(NamedTuple):
    """The topology of a tree on a device. N nodes, W = ceil(N / 64) words."""

    parents: Tensor  # (N,) int64, -1 for node 0
    ancestors: Tensor  # (N, W) int64: bit j of row i says that node j is on the path from node 0 to i, i included
    depths: Tensor  # (N,) int64


@dataclass(frozen=True, eq=False)
class Tree:
    """Node 0 is the pending token; parents[i] < i, and the first n nodes are the best tree of n nodes. All (N,).

    A Tree is one row's. Of several rows each has its own; what a step needs of it on the device is one array,
    `_host.pack_tree`, which rows can be stacked of.
    """

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]  # [0] is not used: the pending token is where the state is
    proposers: NDArray[np.int64]  # who drafted it: HEADS, 1 the first of the other proposers ...; [0] is not used
    probabilities: NDArray[np.float64]  # that the node is accepted, its whole path being right; NaN: not known
    ranks: NDArray[np.int64] | None = None  # >= 0: the node's token is on the device: draft ranks[i] of head depths[i]

    @property
    def size(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        return np.asarray(_host.depths(self.parents))

    @property
    def depth(self) -> int:
        """The most drafts that a step can accept."""
        return int(self.depths.max())

    @property
    def expected_tokens(self) -> NDArray[np.float64]:
        """(N,): [n - 1] is how many tokens a step with the first n nodes is expected to add to the sequence."""
        return np.cumsum(self.probabilities)

    def first(self, size: int) -> Tree:
        """The tree of the `size` best nodes, >= 1; itself, where there are no more."""
        if size >= self.size:
            return self
        ranks = None if self.ranks is None else self.ranks[:size]
        return Tree(self.parents[:size], self.tokens[:size], self.proposers[:size], self.probabilities[:size], ranks)

    def on(self, device: torch.device) -> TreeTensors:
        ancestors = np.asarray(_host.ancestors(self.parents)).astype(np.int64).reshape(self.size, -1)
        return TreeTensors(*(torch.tensor(part, device=device) for part in (self.parents, ancestors, self.depths)))


def tree_of_ranks(parents: Sequence[int], ranks: Sequence[int]) -> Tree:
    """A tree of the heads' drafts, whose tokens are on the device."""
    zeros = np.zeros(len(parents), np.int64)
    unknown = np.where(np.arange(len(parents)) > 0, np.nan, 1.0)
    return Tree(np.array(parents, np.int64), zeros, zeros + HEADS, unknown, np.array(ranks, np.int64))


# The pending token alone: a step without drafts.
ALONE = replace(tree_of_ranks([-1], [0]), ranks=None)


class Trees(Protocol):
    """Makes the trees of one text."""

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these."""

    def grow(self, heads: HeadsSignals | None, max_depth: int, weighed: bool, least: float = 0.0) -> Tree:
        """The largest tree of this step, no deeper than `max_depth` >= 1. weighed: its probabilities have to be known.

        heads: None: they are not asked. least: where it is known that no draft is as likely, the tree may be ALONE.
        Raises ValueError for drafts that are none.
        """


class TreePolicy(ABC):
    """Decides which tree a step verifies.

    size           nodes of the largest tree
    useful_drafts  P: how many drafts of each head any tree looks at
    looks          whether the host has to see the heads' drafts before there is a tree
    sizes          numbers of nodes that steps are recorded for; others are filled up to the next of them
    """

    size: int
    looks: ClassVar[bool]

    @property
    @abstractmethod
    def useful_drafts(self) -> int: ...

    def asked_drafts(self, conditional: bool) -> tuple[int, bool]:
        """How many drafts of each head a tree looks at, and whether they are to be weighed by the token before.

        conditional: whether the heads know how to.
        """
        return self.useful_drafts, False

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]: ...

    @abstractmethod
    def check(self, num_heads: int, proposers: Sequence[ProposerFactory] | None) -> None:
        """Raises ValueError where it does not fit so many heads, or `decode`'s proposers."""

    @abstractmethod
    def default_proposers(self) -> tuple[ProposerFactory, ...]:
        """Besides the heads, where `decode` is told nothing else."""

    @abstractmethod
    def begin(self, proposers: Sequence[Proposer], vocabulary: int) -> Trees:
        """For one text. proposers: of it, besides the heads. vocabulary: of the model, in tokens."""

    @abstractmethod
    def to_json(self) -> Any:
        """What `calibration_entries.tree_from_json` makes an equal policy of."""


def filled_size(nodes: int, sizes: Collection[int]) -> int:
    """The number of nodes of the recorded step that serves a tree of so many: the next of `sizes`; its own,
    where there is none."""
    return min((size for size in sizes if size >= nodes), default=nodes)
