"""Trees new at every step, of the drafts that are most likely to be right.

    DynamicPolicy   what `decode` is told: how large, and how many drafts of each head compete
    TreeGrower    grows the trees of one text
    Tree      the tree of one step; its nodes are tokens

A node is as likely to be accepted as the product of the probabilities on its path says; the most likely nodes are
taken, one after the other (csrc/search/draft_search.h), so that the first n nodes of a tree are the best of n nodes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import _host
from .proposers import HeadsProposer, HeadsSignals, Proposer, ask_proposer, check_values, join_places

MAX_DRAFTS = 32  # that `ops.draft_topk` gives


@dataclass(frozen=True)
class DynamicPolicy:
    """Every step checks the `size` most likely nodes, the root included, of what the proposers draft.

    size: >= 2. drafts: of each head that compete for a place, 1..32; of more than size - 1 none could win one.
    platt: (slope, shift) of every head, where its probabilities p are to be read as
        sigmoid(slope * logit(p) + shift); None: as they are.
    """

    size: int
    drafts: int = MAX_DRAFTS
    platt: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        for name, least, most in (("size", 2, None), ("drafts", 1, MAX_DRAFTS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"DynamicPolicy: {name} must be an integer, got {value!r}")
            if value < least or most is not None and value > most:
                bounds = f">= {least}" if most is None else f"in {least}..{most}"
                raise ValueError(f"DynamicPolicy: {name} must be {bounds}, got {value}")
        if self.platt is not None:
            message = f"DynamicPolicy: platt must be (slope, shift) of every head, got {self.platt!r}"
            try:
                lines = tuple((float(slope), float(shift)) for slope, shift in self.platt)
            except (TypeError, ValueError) as error:
                raise TypeError(message) from error
            if not all(math.isfinite(number) for line in lines for number in line):
                raise ValueError(message)
            object.__setattr__(self, "platt", lines)

    @property
    def useful_drafts(self) -> int:
        """Of each head: as many as may compete, and as could win a place."""
        return min(self.drafts, self.size - 1)


class StepTensors(NamedTuple):
    """A step's tree on a device. N nodes, W = ceil(N / 64) words; parents, ancestors, depths as in TreeTensors."""

    parents: Tensor  # (N,) int64
    ancestors: Tensor  # (N, W) int64
    depths: Tensor  # (N,) int64
    tokens: Tensor  # (N - 1,) int64: of node 1, 2, ...


@dataclass(frozen=True)
class Tree:
    """Node 0 is the root, parents[i] < i. All (N,)."""

    parents: NDArray[np.int64]
    tokens: NDArray[np.int64]  # [0] is not used: the root's token is where the state is
    proposers: NDArray[np.int64]  # who drafted it: 0 the heads, 1 the first of the other proposers ...; [0] is not used
    probabilities: NDArray[np.float64]  # that the node is accepted

    @property
    def size(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        return np.asarray(_host.depths(self.parents))

    @property
    def depth(self) -> int:
        return int(self.depths.max())

    @property
    def expected(self) -> NDArray[np.float64]:
        """(N,): [n - 1] is how many tokens a step with the first n nodes can be expected to gain."""
        return np.cumsum(self.probabilities)

    def first(self, size: int) -> Tree:
        """The tree of the `size` most likely nodes; itself, where there are no more."""
        if size >= self.size:
            return self
        return Tree(self.parents[:size], self.tokens[:size], self.proposers[:size], self.probabilities[:size])

    def cut(self, depth: int) -> Tree:
        """Itself: it has been grown no deeper."""
        assert depth >= self.depth
        return self

    def on(self, device: torch.device) -> StepTensors:
        ancestors = torch.from_numpy(np.asarray(_host.ancestors(self.parents))).to(device)
        parents, depths = torch.from_numpy(self.parents).to(device), torch.from_numpy(self.depths).to(device)
        return StepTensors(parents, ancestors, depths, torch.from_numpy(self.tokens[1:]).to(device))


class TreeGrower:
    """Grows the trees of one text.

    proposers: for this text, besides the heads. vocabulary: of the model, in tokens.
    """

    def __init__(self, tree: DynamicPolicy, proposers: Sequence[Proposer], vocabulary: int) -> None:
        self.tree = tree
        self._proposers = tuple(proposers)
        self._vocabulary = vocabulary

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these."""
        for proposer in self._proposers:
            proposer.extend(tokens)

    def grow(self, heads: HeadsSignals, deepest: int) -> Tree:
        """The tree of this step, no deeper than `deepest`. Raises ValueError for drafts that are none."""
        most = min(deepest, self.tree.size - 1)
        asked = [HeadsProposer(heads, self._vocabulary, self.tree.platt), *self._proposers]
        drafts = [ask_proposer(proposer, most) for proposer in asked]
        places = join_places([(one, number) for number, one in enumerate(drafts) if one.tokens.ndim == 2])
        paths = [(*one, number) for number, one in enumerate(drafts) if one.tokens.ndim == 1 and one.tokens.size]
        try:
            return Tree(*_host.best_drafts(*places, paths, self._vocabulary, self.tree.size, most))
        except ValueError:
            for proposer, one in zip(asked, drafts, strict=True):
                check_values(proposer, one, self._vocabulary)  # says whose they are
            raise


def filled_size(nodes: int, sizes: Collection[int]) -> int:
    """The number of nodes of the compiled step that serves a tree of so many: the next of `sizes`, the compiled ones;
    its own, where there is none."""
    return min((size for size in sizes if size >= nodes), default=nodes)


def padded_size(nodes: int) -> int:
    """The number of nodes, a power of two, of the recorded step that serves a tree of so many."""
    return 1 << (nodes - 1).bit_length()
