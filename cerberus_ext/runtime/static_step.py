"""A decoding step over static tensors, so that it can be recorded once and replayed.

A recording repeats the same operations on the same memory; every number that the host put in stays what it was. So
whatever differs between two steps has to lie on the device, in tensors that stay where they are:

    StaticState   hidden state and root between two steps; the cache is static, too
    StaticNodes   the tree's topology and tokens, for one number of nodes
    StaticDrafts what the heads drafted
    StaticResult  everything that the host wants to know of a step, in one piece: one copy, one wait

Only the number of nodes is the host's. A smaller tree is padded with repetitions of node 1: a repetition is accepted
exactly when node 1 is, and of equally long paths the lowest node wins, so it never changes the result.

Letters: B rows (1 so far), N nodes, W words, K heads, P drafts per head, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import _host, ops
from ..drafting.dynamic_policy import Tree
from ..drafting.static_policy import StaticPolicy
from .stepper import Drafter, Sampling, draft, embeddable, settle

if TYPE_CHECKING:
    from ..drafting.context_layer import BoundContext
    from ..target.cache import TreeCache
    from ..target.model import TargetModel


@dataclass
class StaticState:
    """Between two steps."""

    hidden: Tensor  # (B, D)
    root: Tensor  # (B,) int64


class StaticDrafts:
    """The drafts of one step. drafter: makes them inside of the step; None: the host puts them in before it."""

    def __init__(self, drafter: Drafter | None, batch: int, heads: int, drafts: int, device: torch.device) -> None:
        self.drafter = drafter
        self.drafts = drafts
        self.ids = torch.zeros((batch, heads, drafts), dtype=torch.int64, device=device)
        self.logprobs = torch.zeros((batch, heads, drafts), dtype=torch.float32, device=device)

    def draft(self, cache: TreeCache, state: StaticState) -> None:
        assert self.drafter is not None
        self.put(*draft(self.drafter, cache, state.hidden, state.root, self.drafts))

    def put(self, ids: Tensor, logprobs: Tensor) -> None:
        """ids, logprobs (B, K, P)"""
        self.ids.copy_(ids)
        self.logprobs.copy_(logprobs)


class StaticNodes:
    """The tree of one step: N nodes.

    parents, ancestors, depths: as in TreeTensors.
    proposers (N,): where a node's token is: 0: it is the root; 1 + i: entry i of `given`; 1 + N + k P + r: draft r of
        head k, counted from 0.
    given   (B, N): the tokens of a Tree, whoever drafted them.
    """

    def __init__(self, batch: int, nodes: int, device: torch.device) -> None:
        words = -(-nodes // 64)
        sizes = [nodes] * 3 + [nodes * words, batch * nodes]
        self._packed = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.parents, self.depths, self.proposers, ancestors, given = self._packed.split(sizes)
        self.ancestors, self.given = ancestors.view(nodes, words), given.view(batch, nodes)
        self._tree: StaticPolicy | None = None  # the one that is there

    def put(self, tree: StaticPolicy | Tree, drafts: int) -> None:
        """tree: of 2 to N nodes, or the root alone where N is 1; a StaticPolicy over the heads' drafts, `drafts` each.

        Copies nothing where it is there already.
        """
        if isinstance(tree, Tree) or tree != self._tree:
            self._tree = None  # whatever happens in between
            batch, nodes = self.given.shape
            packed = torch.from_numpy(pack_tree(tree, nodes, batch, drafts))
            self._packed.copy_(packed, non_blocking=True)  # of pageable memory: it is read before this returns
            self._tree = tree if isinstance(tree, StaticPolicy) else None

    def tokens(self, root: Tensor, ids: Tensor | None) -> Tensor:
        """root (B,), ids (B, K, P), None: no head has drafted -> (B, N)"""
        drafted = [] if ids is None else [ids.flatten(1)]
        return torch.cat([root[:, None], self.given, *drafted], 1).index_select(1, self.proposers)


def pack_tree(tree: StaticPolicy | Tree, nodes: int, batch: int, drafts: int) -> np.ndarray:
    """parents, depths, proposers (N,), ancestors (N, W) and given (B, N) of `tree`, padded to `nodes` nodes, as
    int64.
    """
    missing = nodes - tree.size
    parents = np.concatenate([np.asarray(tree.parents), np.zeros(missing, np.int64)])
    depths, ancestors = np.asarray(_host.depths(parents)), np.asarray(_host.ancestors(parents))
    given = np.zeros(nodes, np.int64)
    if isinstance(tree, Tree):
        place = np.concatenate([np.arange(tree.size), np.ones(missing, np.int64)])  # in `given`
        proposers = np.where(depths > 0, 1 + place, 0)
        given[: tree.size] = tree.tokens
    else:
        ranks = np.asarray(tree.ranks + tree.ranks[1:2] * missing)
        proposers = np.where(depths > 0, 1 + nodes + (depths - 1) * drafts + ranks, 0)
    return np.concatenate([parents, depths, proposers, ancestors.reshape(-1), np.tile(given, batch)])


class StaticResult:
    """What the host gets of a step: one buffer, and its twin on the host.

    target (B, N), path (B, N) int64, as in `stepper.Settled`; the path stays 0, -1 ... where there is only the root.
    entropy (B,) float32: of softmax(hidden), for the next step's gate.
    ids, logprobs (B, K, P) int64, float32: the drafts for the next step; None where they are not drafted yet.
    """

    def __init__(self, batch: int, nodes: int, drafts: StaticDrafts | None, device: torch.device) -> None:
        shape = None if drafts is None else drafts.logprobs.shape
        drafted = 0 if shape is None else shape[1] * shape[2]
        columns = 2 * nodes + drafted + -(-(1 + drafted) // 2)  # two float32 in the place of an int64
        self.buffer = torch.zeros((batch, columns), dtype=torch.int64, device=device)
        self.host = torch.zeros((batch, columns), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._nodes, self._shape = nodes, shape
        self.target, self.path, self.entropy, self.ids, self.logprobs = self._parts(self.buffer)
        self.path[:, 1:] = -1

    def read(self) -> tuple[list[int], list[int], float, tuple[Tensor, Tensor] | None]:
        """target, path and entropy of row 0, ids and log-probabilities, after the buffer was copied to `host`."""
        target, path, entropy, ids, logprobs = self._parts(self.host)
        drafts = None if ids is None or logprobs is None else (ids.clone(), logprobs.clone())
        return target[0].tolist(), path[0].tolist(), entropy[0].item(), drafts

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        target, path, rest = buffer.tensor_split([self._nodes, 2 * self._nodes], 1)
        if self._shape is None:
            return target, path, rest.view(torch.float32)[:, 0], None, None
        drafted = self._shape[1] * self._shape[2]
        ids, floats = rest[:, :drafted].unflatten(1, self._shape[1:]), rest[:, drafted:].view(torch.float32)
        return target, path, floats[:, 0], ids, floats[:, 1 : 1 + drafted].unflatten(1, self._shape[1:])


@dataclass(frozen=True)
class StepKind:
    """What a recorded step depends on; a recording serves every step of the same kind.

    drafts: the heads', where they are looked at: by the nodes, or by the host before the next step.
    drafts_before: the heads draft at the beginning of the step, for gates that decide without the drafts.
    drafts_after: they draft at the end, for the next step, whose gate wants to see the log-probabilities.
    context: of the heads, which is told of every step's tokens; None: they have none.
    """

    nodes: int
    sampling: Sampling
    drafts: StaticDrafts | None = None
    drafts_before: bool = False
    drafts_after: bool = False
    context: BoundContext | None = None


def run_step(base: TargetModel, kind: StepKind, state: StaticState, nodes: StaticNodes, result: StaticResult) -> None:
    """A whole step on the device: nothing here depends on a tensor's values, or waits for them."""
    drafts = kind.drafts
    if kind.drafts_before:
        assert drafts is not None
        drafts.draft(base.cache, state)
    tokens = known = state.root[:, None]  # (B, 1)
    if kind.nodes > 1:
        tokens = nodes.tokens(state.root, None if drafts is None else drafts.ids)  # (B, N)
        known = embeddable(tokens, base)
    hidden, logits = base.step(known, nodes)  # (B, N, D), (B, N, V)
    if kind.context is not None:
        kind.context.keep_nodes(base.cache, state.hidden, hidden, known, nodes)
    # However deep the tree is, its longest path has no more than N nodes.
    settled = settle(base.cache, tokens, hidden, logits, nodes, kind.nodes - 1, kind.sampling)
    state.hidden.copy_(settled.hidden)
    state.root.copy_(settled.root)
    result.target.copy_(settled.target)
    if settled.path is not None:
        result.path.copy_(settled.path)
    result.entropy.copy_(ops.hidden_entropy(state.hidden))
    if kind.drafts_after:
        assert drafts is not None and result.ids is not None and result.logprobs is not None
        drafts.draft(base.cache, state)
        result.ids.copy_(drafts.ids)
        result.logprobs.copy_(drafts.logprobs)
