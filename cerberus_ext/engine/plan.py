"""How one decode drafts: heads, tree, gate and proposers, checked together and with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..drafting.dynamic_policy import DynamicPolicy, TreeGrower, padded_size
from ..drafting.gate import AlwaysClosed, AlwaysOpen, Gate, answers, wants_draft_trees
from ..drafting.heads import CerberusHeads, input_matrix
from ..drafting.proposers import ProposerFactory, make_proposer
from ..drafting.static_policy import StaticPolicy, default_size, default_tree
from ..drafting.suffix import SuffixProposer
from ..runtime.stepper import HeadsLike
from . import checks
from .calibration_store import find

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MIN_DYNAMIC = 6  # nodes; a CPU without AMX computes each of them, and was fastest with so many (calibrated, AVX2)
# Of a DynamicPolicy that has not found as many nodes as it may have. Each of them takes seconds to compile.
_FILLED_SIZES = (4, 8, 16, 32, 64)


class NoHeads:
    """For decoding with other proposers alone."""

    config = SimpleNamespace(num_heads=0)

    def bind(self, model: PreTrainedModel) -> Any:
        return None  # nobody asks it: no tree has drafts of heads


@dataclass(frozen=True)
class Plan:
    """makers: of the proposers besides the heads; none for a StaticPolicy. vocabulary: the model's, in tokens."""

    heads: HeadsLike
    tree: StaticPolicy | DynamicPolicy
    gate: Gate
    makers: tuple[ProposerFactory, ...]
    vocabulary: int

    @property
    def drafts(self) -> int:
        """P: how many drafts of each head any step looks at; 0: the heads are not asked."""
        drafts = max_drafts(self.tree, self.gate)
        if isinstance(self.tree, DynamicPolicy):
            known = getattr(self.heads.config, "draft_vocab", None) or self.vocabulary
            return min(drafts, known) if self.heads.config.num_heads else 0
        return drafts

    @property
    def max_nodes(self) -> int:
        """Of any step's tree."""
        if isinstance(self.tree, DynamicPolicy):
            return padded_size(self.tree.size)
        return max(one.size for one in self.gate.trees(self.tree))

    @property
    def sizes(self) -> set[int]:
        """Numbers of nodes that steps are compiled for."""
        return compiled_sizes(self.tree, self.gate)

    @property
    def looks_ahead(self) -> bool:
        """Whether the host wants to see the heads' drafts before it chooses a tree."""
        return isinstance(self.tree, DynamicPolicy) or answers(self.gate, "choose")

    def without_drafts(self) -> Plan:
        """For a model that cannot verify any."""
        return Plan(NoHeads(), StaticPolicy.root(), AlwaysClosed(), (), self.vocabulary)

    def begin(self, text: list[int]) -> StaticPolicy | TreeGrower:
        """text: the prompt and the first token behind it -> what makes the trees of this text."""
        return begin_trees(self.tree, self.makers, text, self.vocabulary)


def max_drafts(tree: StaticPolicy | DynamicPolicy, gate: Gate) -> int:
    """Of each head, that any step's tree may hold."""
    return tree.useful_drafts if isinstance(tree, DynamicPolicy) else max(one.drafts for one in gate.trees(tree))


def compiled_sizes(tree: StaticPolicy | DynamicPolicy, gate: Gate) -> set[int]:
    """Numbers of nodes that steps are compiled for; a step with another one is filled up to the next of them."""
    if isinstance(tree, DynamicPolicy):
        return {1, tree.size, *(size for size in _FILLED_SIZES if size < tree.size)}
    return {1, *(one.size for one in gate.trees(tree))}


def begin_trees(
    tree: StaticPolicy | DynamicPolicy, makers: Sequence[ProposerFactory], text: list[int], vocabulary: int
) -> StaticPolicy | TreeGrower:
    """What makes the trees of a text: a StaticPolicy itself, else a grower with proposers of its own."""
    if isinstance(tree, StaticPolicy):
        return tree
    proposers = [make_proposer(maker, number, list(text)) for number, maker in enumerate(makers)]
    return TreeGrower(tree, proposers, vocabulary)


def makers_for(
    tree: StaticPolicy | DynamicPolicy, proposers: Sequence[ProposerFactory] | None
) -> tuple[ProposerFactory, ...]:
    """decode's `proposers`; None: the text's own past for a DynamicPolicy, nobody for a StaticPolicy."""
    if proposers is not None:
        return tuple(proposers)
    return (SuffixProposer(),) if isinstance(tree, DynamicPolicy) else ()


def default_policy(device: torch.device) -> DynamicPolicy:
    """Of about as many nodes as a forward carries for little more than a plain step."""
    return DynamicPolicy(max(default_size(device), _MIN_DYNAMIC))


def make_plan(
    model: PreTrainedModel,
    heads: HeadsLike | None,
    tree: int | StaticPolicy | DynamicPolicy | None,
    gate: Gate | None,
    proposers: Sequence[ProposerFactory] | None,
    compiled: bool = False,
) -> Plan:
    """The arguments of `decode`, checked and completed as described there. compiled: its `compile`."""
    heads = NoHeads() if heads is None else heads
    checks.check_heads(heads)
    if tree is not None:
        tree = checks.check_tree(tree, heads.config.num_heads)
    if proposers is not None:
        checks.check_proposers(proposers, tree)
    if isinstance(gate, AlwaysClosed):
        tree = StaticPolicy.root()  # nothing is to be drafted
    if tree is None:
        calibrated = find(heads, model.device, model.dtype, torch.get_num_threads(), compiled)
        static = isinstance(gate, Gate) and wants_draft_trees(gate)
        if calibrated and (not static if isinstance(calibrated.tree, DynamicPolicy) else proposers is None):
            tree, gate = calibrated.tree, calibrated.gate if gate is None else gate
        elif proposers is None and not isinstance(heads, NoHeads) and (static or not isinstance(heads, CerberusHeads)):
            tree = default_tree(heads, model.device)  # other heads may draft along the paths of a given tree
        else:
            tree = default_policy(model.device)
    gate = AlwaysOpen() if gate is None else checks.check_gate(gate, tree)
    if isinstance(tree, DynamicPolicy):
        gate.check_size(tree.size)
    else:
        for one in gate.trees(tree):
            checks.check_tree(one, heads.config.num_heads)
    vocabulary = input_matrix(model).shape[0]
    return Plan(heads, tree, gate, makers_for(tree, proposers), vocabulary)
