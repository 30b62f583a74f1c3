"""How one decode drafts: heads, tree, gate and proposers, checked together and with their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel

from ..drafting.drafter import NO_DRAFTER, Drafter, HeadsLike
from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, Gate
from ..drafting.heads import input_matrix
from ..drafting.proposers import ProposerFactory, make_proposer
from ..drafting.static_policy import StaticPolicy, default_size
from ..drafting.tree import TreePolicy, Trees
from ..runtime.runtime import runtime_of
from ..runtime.stepper import Drafts
from . import checks
from .budget import Costs, costs_of, costs_of_one
from .calibration_store import find

_MIN_DYNAMIC = 6  # nodes; a CPU without AMX computes each of them, and was fastest with so many (calibrated, AVX2)


class NoHeads:
    """For decoding with other proposers alone."""

    config = SimpleNamespace(num_heads=0)

    def bind(self, model: PreTrainedModel) -> Drafter:
        return NO_DRAFTER


@dataclass(frozen=True)
class Plan:
    """makers: of the proposers besides the heads. vocabulary: the model's, in tokens. costs: see budget.py."""

    heads: HeadsLike
    policy: TreePolicy
    gate: Gate
    makers: tuple[ProposerFactory, ...]
    vocabulary: int
    costs: Costs

    @property
    def drafts(self) -> Drafts:
        asked = asked_drafts(self.heads, self.policy, self.vocabulary)
        return Drafts(self.heads, *asked, self.looks, self.policy.sizes)

    @property
    def looks(self) -> bool:
        """Whether the host wants to see the heads' drafts before it has a tree."""
        return self.policy.looks or "expected_tokens" in self.gate.needs

    def without_drafts(self) -> Plan:
        """For a model that cannot verify any."""
        return Plan(NoHeads(), StaticPolicy.root(), AlwaysClosed(), (), self.vocabulary, self.costs)

    def begin(self, text: list[int]) -> Trees:
        """text: the prompt and the first token behind it -> what makes the trees of this text."""
        proposers = [make_proposer(maker, number, list(text)) for number, maker in enumerate(self.makers)]
        return self.policy.begin(proposers, self.vocabulary)


def asked_drafts(heads: HeadsLike, policy: TreePolicy, vocabulary: int) -> tuple[int, bool]:
    """How many drafts of each head there are to be, and whether they are weighed by the token before."""
    config = heads.config
    drafts, conditional = policy.asked_drafts(getattr(config, "conditional_rank", None) is not None)
    if policy.looks:  # it takes what there is; the others name their drafts, which have to be there
        known = getattr(config, "draft_vocab", None) or vocabulary
        drafts = min(drafts, known) if config.num_heads else 0
    return drafts, conditional


def default_policy(device: torch.device) -> DynamicPolicy:
    """Of about as many nodes as a forward carries for little more than a plain step."""
    return DynamicPolicy(max(default_size(device), _MIN_DYNAMIC))


def default_gate(device: torch.device, dtype: torch.dtype) -> Gate:
    """Where nothing was calibrated: on a CPU another node costs something, so that as many are taken as their
    probabilities are worth. On a GPU all."""
    return ConfidenceGate(costs_of_one(device, dtype)) if device.type == "cpu" else AlwaysOpen()


def make_plan(
    model: PreTrainedModel,
    heads: HeadsLike | None,
    tree: int | TreePolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
) -> Plan:
    """The arguments of `decode`, checked and completed as described there."""
    heads = NoHeads() if heads is None else heads
    checks.check_heads(heads)
    policy, costs = None if tree is None else checks.check_tree(tree), None
    checks.check_proposers(proposers)
    if gate is not None:
        checks.check_gate(gate)
    otherwise: Gate = AlwaysOpen()
    if policy is None:
        kept = runtime_of(model).looked_up
        calibrated = find(heads, model.device, model.dtype, torch.get_num_threads(), kept)
        if calibrated and (proposers is None or calibrated.tree.looks):
            policy, gate, costs = calibrated.tree, calibrated.gate if gate is None else gate, calibrated.batches
        else:
            policy, otherwise = default_policy(model.device), default_gate(model.device, model.dtype)
    policy.check(heads.config.num_heads, proposers)
    if isinstance(gate, ConfidenceGate):
        gate.check_size(policy.size)  # better than at the first step, with the prompt handed out
    makers = policy.default_proposers() if proposers is None else tuple(proposers)
    if isinstance(gate, AlwaysClosed):  # nothing is to be drafted
        policy, makers = StaticPolicy.root(), ()
    costs = costs or costs_of(gate, model.device, model.dtype)
    return Plan(heads, policy, gate or otherwise, makers, input_matrix(model).shape[0], costs)
