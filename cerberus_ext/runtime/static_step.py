"""A decoding step over static tensors: run as it is, or recorded once and replayed.

A recording repeats the same operations on the same memory; every number that the host put in stays what it was. So
whatever differs between two steps lies on the device, in tensors that stay where they are (StepMemory has all of them
for one model), and everything that the host wants to know of a step is in one piece: one copy, one wait.

Only the number of nodes is the host's. A smaller tree is padded with repetitions of node 1: a repetition is accepted
exactly when node 1 is, and of equally long paths the lowest node wins, so it never changes the result.

Letters: B rows (1 so far), N nodes, W words, K heads, P drafts per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _host, ops
from ..drafting.drafter import NO_DRAFTER, Drafter
from ..drafting.tree import Tree
from ..ops.step import settle
from ..target.cache import TreeCache
from ..target.model import TargetModel
from .sampling import Chooser, RecordedChoosers
from .static_result import StaticDrafts, StaticResult


class StaticState(NamedTuple):
    """Between two steps."""

    hidden: Tensor  # (B, D): what the pending token was chosen from
    pending: Tensor  # (B,) int64: chosen, not yet in the cache


class StaticNodes:
    """The tree of one step: N nodes.

    parents, ancestors, depths: as in TreeTensors.
    sources (N,): where a node's token is: 0: it is the pending one; 1 + i: entry i of `given`; 1 + N + k P + r: draft r
        of head k, counted from 0.
    given   (B, N): the tokens that the host knows, whoever drafted them.
    tree    the one that is there.
    """

    def __init__(self, batch: int, nodes: int, device: torch.device) -> None:
        words = -(-nodes // 64)
        sizes = [nodes] * 3 + [nodes * words, batch * nodes]
        self._packed = torch.zeros(sum(sizes), dtype=torch.int64, device=device)
        self.parents, self.depths, self.sources, ancestors, given = self._packed.split(sizes)
        self.ancestors, self.given = ancestors.view(nodes, words), given.view(batch, nodes)
        # The last copy from there is over when the host has read a step behind it.
        self._host = torch.zeros(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.tree: Tree | None = None
        self._drafts = 0

    def put(self, tree: Tree, drafts: int) -> None:
        """tree: of 2 to N nodes, or the pending token alone where N is 1. drafts: of each head, that nodes may name.

        Copies nothing where it is there already.
        """
        if tree is not self.tree or drafts != self._drafts:
            self.tree = None  # whatever happens in between
            batch, nodes = self.given.shape
            packed = _host.pack_tree(tree.parents, tree.tokens, tree.ranks, nodes, batch, drafts)
            self._host.copy_(torch.from_numpy(packed))
            self._packed.copy_(self._host, non_blocking=True)
            self.tree, self._drafts = tree, drafts

    def tokens(self, pending: Tensor, ids: Tensor | None) -> Tensor:
        """pending (B,), ids (B, K, P), None: no head has drafted -> (B, N)"""
        drafted = [] if ids is None else [ids.flatten(1)]
        return torch.cat([pending[:, None], self.given, *drafted], 1).index_select(1, self.sources)


class Drafting(Enum):
    """When a step calls the heads by itself."""

    NEVER = 0  # the host does it, before the step
    BEFORE = 1  # at the beginning, for gates that decide without the drafts
    AFTER = 2  # at the end, for the next step, whose gate or tree wants to see them


@dataclass(frozen=True)
class StepKind:
    """What a step depends on besides its memory; a recording serves every step of the same kind.

    drafter: of the heads that it calls, or that are told of its tokens.
    shape: (K, P) of the drafts that nodes may name, or that it makes; None: it has nothing to do with any.
    conditional: whether those that it makes are weighed by the token before, too.
    """

    nodes: int
    chooser: Chooser
    drafter: Drafter = NO_DRAFTER
    shape: tuple[int, int] | None = None
    drafting: Drafting = Drafting.NEVER
    conditional: bool = False


class StepMemory:
    """What the steps of a model read and write, by size. cache: of batch rows."""

    def __init__(self, cache: TreeCache) -> None:
        self.cache = cache
        self.batch, self.device = len(cache.length), cache.length.device
        self._state: StaticState | None = None
        self._nodes: dict[int, StaticNodes] = {}
        self._drafts: dict[tuple[int, int], StaticDrafts] = {}
        self.choosers = RecordedChoosers(self.device)

    @property
    def state(self) -> StaticState:
        assert self._state is not None  # after the prompt
        return self._state

    def begin(self, hidden: Tensor, pending: Tensor) -> None:
        """hidden (B, D), pending (B,) after the prompt."""
        if self._state is None:
            self._state = StaticState(hidden.clone(memory_format=torch.contiguous_format), pending.clone())
        self._state.hidden.copy_(hidden)
        self._state.pending.copy_(pending)

    def nodes(self, size: int) -> StaticNodes:
        if size not in self._nodes:
            self._nodes[size] = StaticNodes(self.batch, size, self.device)
        return self._nodes[size]

    def drafts(self, shape: tuple[int, int]) -> StaticDrafts:
        """shape: (K, P)"""
        if shape not in self._drafts:
            self._drafts[shape] = StaticDrafts(self.batch, *shape, self.device)
        return self._drafts[shape]

    def result(self, kind: StepKind) -> StaticResult:
        """A new one."""
        shape = kind.shape if kind.drafting is Drafting.AFTER else None
        return StaticResult(self.batch, kind.nodes, shape, kind.conditional, self.device)

    def changed_by(self, kind: StepKind) -> list[Tensor]:
        """What a step changes, and the next one reads. Of the cache, slots from length on hold nothing that counts."""
        drafts = [] if kind.shape is None else [self.drafts(kind.shape).ids, self.drafts(kind.shape).logprobs]
        return [self.state.hidden, self.state.pending, self.cache.length, *drafts]


class StepInputs(NamedTuple):
    """tokens (B, N): of the nodes; known (B, N): the same with token 0 for those that the model does not have."""

    tokens: Tensor
    known: Tensor


def run_step(target: TargetModel, kind: StepKind, memory: StepMemory, result: StaticResult) -> None:
    """A whole step: propose, forward, verify, commit. With a chooser without host_rules and a drafter that is
    recordable, nothing here depends on a tensor's values, or waits for them."""
    inputs = begin_step(target, kind, memory)
    hidden, logits = target.step(inputs.known, memory.nodes(kind.nodes))  # (B, N, D), (B, N, V)
    end_step(kind, memory, inputs, hidden, logits, result)


def begin_step(target: TargetModel, kind: StepKind, memory: StepMemory) -> StepInputs:
    """What comes before the forward of `run_step`."""
    state, nodes = memory.state, memory.nodes(kind.nodes)
    drafts = None if kind.shape is None else memory.drafts(kind.shape)
    if drafts is not None and kind.drafting is Drafting.BEFORE:
        drafts.put(*kind.drafter.propose(memory.cache, state.hidden, state.pending, drafts.ids.shape[2]))
    tokens = known = state.pending[:, None]  # (B, 1)
    if kind.nodes > 1:
        tokens = known = nodes.tokens(state.pending, None if drafts is None else drafts.ids)  # (B, N)
        if drafts is not None:
            known = embeddable(tokens, target)
    return StepInputs(tokens, known)


def end_step(
    kind: StepKind, memory: StepMemory, inputs: StepInputs, hidden: Tensor, logits: Tensor, result: StaticResult
) -> None:
    """What comes behind the forward of `run_step`, which gave hidden (B, N, D) and logits (B, N, V)."""
    cache, state, nodes = memory.cache, memory.state, memory.nodes(kind.nodes)
    # The token after node i stands one place behind the node, which is at length + depth.
    positions = cache.length[:, None] + nodes.depths + 1  # (B, N)
    target = kind.chooser.targets(logits, inputs.tokens, nodes.tree, positions)
    kind.drafter.keep_nodes(cache, state.hidden, hidden, inputs.known, nodes)
    _settle(kind, cache, nodes, inputs.tokens, hidden, target, state, result)
    kind.drafter.keep_path(hidden, inputs.known, result.path)
    entropy = ops.hidden_entropy(state.hidden)
    if kind.shape is None or kind.drafting is not Drafting.AFTER:
        return result.put(entropy)
    drafts = memory.drafts(kind.shape)
    drafts.put(*kind.drafter.propose(cache, state.hidden, state.pending, drafts.ids.shape[2]))
    after = None
    if kind.conditional:
        assert kind.drafter.conditional is not None
        after = kind.drafter.conditional.rerank(drafts.ids, drafts.logprobs)
    result.put(entropy, drafts, after)


def _settle(
    kind: StepKind, cache: TreeCache, nodes: StaticNodes, tokens: Tensor, hidden: Tensor, target: Tensor,
    state: StaticState, result: StaticResult,
) -> None:  # fmt: skip
    """tokens (B, N), hidden (B, N, D) of a forward, target (B, N): keeps the longest path that the target model agrees
    with, and what the next step begins with."""
    result.target.copy_(target)
    if kind.nodes == 1:  # the pending token, which is always accepted and lies where it has to stay
        cache.length += 1
        state.hidden.copy_(hidden[:, 0])
        state.pending.copy_(target[:, 0])
        return
    if tokens.device.type == "cpu" and len(tokens) == 1 and cache.tensor is not None:
        tree = tokens[0], target[0].contiguous(), nodes.parents, [nodes.ancestors]
        written = [state.hidden], [state.pending], result.path[0]
        return settle(*tree, [cache.tensor], [cache.length], hidden[0].contiguous(), *written)
    # However deep the tree is, its longest path has no more than N nodes.
    path, accepted = ops.verify_tree(tokens, target, nodes.parents, nodes.ancestors, kind.nodes - 1)
    cache.commit(path, accepted)
    last = path.amax(1, keepdim=True).long()  # (B, 1): nodes come after their parents
    state.hidden.copy_(hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))[:, 0])
    state.pending.copy_(target.gather(1, last)[:, 0])
    result.path.copy_(path)


def embeddable(tokens: Tensor, target: TargetModel) -> Tensor:
    """tokens of a tree's nodes, with token 0 in the place of those that the model does not have.

    For the forward alone: verifying gets the others, which the target model never chooses.
    """
    return tokens.masked_fill((tokens < 0) | (tokens >= target.vocabulary), 0)
