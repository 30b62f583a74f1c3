"""The same tree at every step: which of the heads' drafts are verified, and how they hang together.

Node 0 is the pending token. A node at depth d is one draft of head d (heads counted from 1), the one of the given rank
among that head's drafts, 0 the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch

from .. import _host
from ..io.checks import check_integer
from .platt import reading
from .proposers import HeadsSignals, Proposer, ProposerFactory
from .tree import ALONE, Tree, TreePolicy, tree_of_ranks

Path = tuple[int, ...]
_READ = reading(None)


def _integers(what: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{what} must be a sequence of integers, got {values!r}")
    numbers = tuple(values)
    for value in numbers:
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{what} must be integers, got {value!r}")
    return tuple(int(value) for value in numbers)


@dataclass(frozen=True)
class StaticPolicy(TreePolicy):
    """A tree of the heads' drafts, checked once, here; equal ones compare equal.

    parents: parents[0] = -1 and parents[i] < i. Nodes come best first: a gate that wants n nodes gets the first n.
    ranks: ranks[0] = 0, not used; node i is draft number ranks[i] of head depths[i]. Siblings have different ranks.

    Example: the pending token, its two best continuations, and one draft of what follows the better one (ranks along
    the paths (0), (1) and (0, 0)):

        StaticPolicy(parents=(-1, 0, 0, 1), ranks=(0, 0, 1, 0)) == StaticPolicy.from_paths([(0,), (1,), (0, 0)])
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    _cut: dict[int, Tree] = field(default_factory=dict, init=False, repr=False, compare=False)
    looks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("parents", "ranks"):
            object.__setattr__(self, name, _integers(f"StaticPolicy: {name}", getattr(self, name)))
        if len(self.parents) != len(self.ranks):
            raise ValueError(
                f"StaticPolicy: ranks must have one entry per node ({len(self.parents)}), got {len(self.ranks)}"
            )
        if not self.parents or self.parents[0] != -1:
            raise ValueError(f"StaticPolicy: parents must begin with -1, the root's, got {self.parents[:1]}")
        if self.ranks[0] != 0:
            raise ValueError(f"StaticPolicy: ranks must begin with 0, the root's, got {self.ranks[0]}")
        seen: dict[tuple[int, int], int] = {}
        for node, (parent, rank) in enumerate(zip(self.parents, self.ranks, strict=True)):
            if node and not 0 <= parent < node:
                raise ValueError(f"StaticPolicy: parents[{node}] must be in 0..{node - 1}, got {parent}")
            if rank < 0:
                raise ValueError(f"StaticPolicy: ranks[{node}] must be >= 0, got {rank}")
            if (parent, rank) in seen:
                raise ValueError(
                    f"StaticPolicy: siblings must have different ranks, nodes {seen[parent, rank]} and {node}"
                    f" are both draft {rank} after node {parent}"
                )
            seen[parent, rank] = node

    @cached_property
    def tree(self) -> Tree:
        """All of it."""
        return tree_of_ranks(self.parents, self.ranks) if self.size > 1 else ALONE

    @property
    def size(self) -> int:  # type: ignore[override]
        return len(self.parents)

    @property
    def depth(self) -> int:
        """How many heads the tree needs, and the most a step can accept."""
        return self.tree.depth

    @property
    def useful_drafts(self) -> int:
        """P; 0 for a tree that is only a root."""
        return max(self.ranks[1:], default=-1) + 1

    @property
    def sizes(self) -> tuple[int, ...]:
        return (1, self.size) if self.size > 1 else (1,)

    def check(self, num_heads: int, proposers: Sequence[ProposerFactory] | None) -> None:
        if proposers:
            raise ValueError("decode: proposers must be None or empty with a StaticPolicy, whose drafts are the heads'")
        if self.depth > num_heads:
            raise ValueError(
                f"decode: tree must not be deeper than the heads, {num_heads}, got a depth of {self.depth}"
            )

    def default_proposers(self) -> tuple[ProposerFactory, ...]:
        return ()

    def begin(self, proposers: Sequence[Proposer], vocabulary: int) -> StaticPolicy:
        """Itself: it learns nothing of a text."""
        return self

    def extend(self, tokens: list[int]) -> None:
        pass

    def grow(self, heads: HeadsSignals | None, max_depth: int, weighed: bool, least: float = 0.0) -> Tree:
        tree = self.cut(max_depth)
        return self._weigh(tree, heads) if weighed and heads and tree.size > 1 else tree

    def cut(self, depth: int) -> Tree:
        """The tree without the nodes deeper than `depth`."""
        if depth >= self.depth:
            return self.tree
        if depth not in self._cut:
            kept = [path for path in self.paths() if len(path) <= depth]
            self._cut[depth] = StaticPolicy.from_paths(kept).tree
        return self._cut[depth]

    @staticmethod
    def _weigh(tree: Tree, heads: HeadsSignals) -> Tree:
        """With the product of the heads' probabilities along every node's path."""
        assert tree.ranks is not None
        logprobs = heads.drafts().logprobs  # (K, P)
        probabilities = _READ(logprobs.astype(np.float64))[tree.depths - 1, tree.ranks]
        probabilities[0] = 1.0
        for node, parent in enumerate(tree.parents[1:].tolist(), start=1):
            probabilities[node] *= probabilities[parent]
        return replace(tree, probabilities=probabilities)

    def paths(self) -> list[Path]:
        """The ranks along the path to every node but the root, in node order."""
        paths: list[Path] = [()]
        for parent, rank in zip(self.parents[1:], self.ranks[1:], strict=True):
            paths.append((*paths[parent], rank))
        return paths[1:]

    def to_json(self) -> str:
        """The ranks along every path: "0 1 0.0" is the two best continuations, and the best one of the first."""
        return " ".join(".".join(map(str, path)) for path in self.paths())

    @staticmethod
    def root() -> StaticPolicy:
        """The tree without drafts: a step with it is an autoregressive step."""
        return _ROOT

    @staticmethod
    def chain(depth: int) -> StaticPolicy:
        """The best draft of each of the first `depth` heads: one path."""
        return StaticPolicy.from_widths([1] * check_integer("StaticPolicy.chain: depth", depth, 0))

    @staticmethod
    def from_widths(widths: Sequence[int]) -> StaticPolicy:
        """Every node at depth d - 1 is followed by head d's widths[d - 1] best drafts: [3, 2] has 1 + 3 + 6 nodes."""
        widths = _integers("StaticPolicy.from_widths: widths", widths)
        paths: list[Path] = []
        level: list[Path] = [()]
        for index, width in enumerate(widths):
            check_integer(f"StaticPolicy.from_widths: widths[{index}]", width, 1)
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        return StaticPolicy.from_paths(paths)

    @staticmethod
    def from_paths(paths: Iterable[Sequence[int]]) -> StaticPolicy:
        """From the ranks along each path, best path first: (1, 0) is head 1's second draft followed by head 2's best.

        The beginnings of a path come with it, in front of it where they are not there yet.
        """
        if isinstance(paths, str | bytes) or not isinstance(paths, Iterable):
            raise TypeError(f"StaticPolicy.from_paths: paths must be a sequence of paths, got {paths!r}")
        node: dict[Path, int] = {(): 0}
        for index, ranks in enumerate(paths):
            path = _integers(f"StaticPolicy.from_paths: paths[{index}]", ranks)
            if not path:
                raise ValueError(f"StaticPolicy.from_paths: paths[{index}] must have at least one rank, got none")
            if min(path) < 0:
                raise ValueError(f"StaticPolicy.from_paths: paths[{index}] must be ranks >= 0, got {path}")
            for end in range(1, len(path) + 1):
                node.setdefault(path[:end], len(node))
        nodes = list(node)[1:]
        return StaticPolicy((-1, *(node[path[:-1]] for path in nodes)), (0, *(path[-1] for path in nodes)))

    @staticmethod
    def from_accuracies(accuracy: Any, size: int) -> StaticPolicy:
        """The tree of `size` nodes, the root included, with the most tokens to be expected a step.

        accuracy: (K, P), anything numpy understands: entry [k][r] is the probability that draft r of head k + 1 is
        right where the drafts before it on the path are right. A node is worth the product along its path; the best
        nodes are taken first. Fewer nodes come back where the K x P drafts do not make that many.
        """
        table = np.asarray(accuracy, dtype=np.float64)
        if table.ndim != 2 or 0 in table.shape:
            raise ValueError(
                f"StaticPolicy.from_accuracies: accuracy must be a (heads, drafts) table, got shape {table.shape}"
            )
        if not ((table >= 0) & (table <= 1)).all():  # false for NaN too
            raise ValueError("StaticPolicy.from_accuracies: accuracy must be probabilities in 0..1, got others")
        check_integer("StaticPolicy.from_accuracies: size", size, 1)
        heads, drafts = table.shape
        possible = sum(drafts**depth for depth in range(heads + 1))
        parents, ranks = _host.best_tree(table, min(size, possible))
        return StaticPolicy(tuple(parents), tuple(ranks))


_ROOT = StaticPolicy((-1,), (0,))

_MAX_DEFAULT_HEADS = 5
_DEFAULT_DRAFTS = 8


def default_size(device: torch.device) -> int:
    """Nodes of the tree where the caller names none: about what a forward carries for little more than a plain step.

    A GPU reads the weights once for all nodes. A CPU computes every node: with AMX 16 of them cost little, without it a
    step's time grows with every few. `cerberus calibrate` measures what is best on a machine.
    """
    if device.type != "cpu":
        return 32
    return 16 if torch.cpu._is_amx_tile_supported() else 4


def default_tree(heads: Any, device: torch.device, size: int | None = None) -> StaticPolicy:
    """The tree for heads on a device: what was measured with the heads, else a general one.

    size: nodes, the root included; None: `default_size(device)`. There are fewer where heads do not draft so much.
    heads: `heads.config.paths` (best paths first) is preferred to `heads.config.accuracy` (K, P). Without either, head
    k + 1's draft r is taken to be right with probability 0.6 * 0.8^k * 0.4^r, roughly what lightly trained heads reach.
    """
    size = default_size(device) if size is None else size
    config = heads.config
    if paths := getattr(config, "paths", None):
        return StaticPolicy.from_paths(paths[: size - 1])
    accuracy = getattr(config, "accuracy", None)
    if accuracy is None:
        depth = min(config.num_heads, _MAX_DEFAULT_HEADS)
        accuracy = [[0.6 * 0.8**k * 0.4**r for r in range(_DEFAULT_DRAFTS)] for k in range(depth)]
    return StaticPolicy.from_accuracies(accuracy, size)
