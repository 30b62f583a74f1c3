"""Decoding without a model: the steps that `decode` would take through texts that are known, and their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial

from torch import Tensor

from ..drafting.gate import Gate
from ..drafting.proposers import HeadsDrafts, ProposerFactory, make_proposer
from ..drafting.simulate import steps_through
from ..drafting.tree import Tree, TreePolicy, Trees
from ..engine.loop import propose
from ..runtime.stats import StepCounts
from .cost import StepCosts
from .trace import TracedText


@dataclass
class Tally(StepCounts):
    """What the steps through some texts come to. The first token of a text comes with the prompt, without a step.

    tokens    those that are in the texts: a last step that goes beyond the end is counted as far as the end
    nodes     that the steps' forwards verified, the pending tokens included
    accepted  [a]: steps that accepted a drafts
    expected  of every step with drafts: tokens that it was expected to add, and those that it added
    """

    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0
    accepted: Counter[int] = field(default_factory=Counter)
    expected: list[tuple[float, int]] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def nodes_per_step(self) -> float:
        return self.nodes / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the steps, without the prompt."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))


class Place:
    """What a gate or a tree may see at one place of a text, see `loop.StepSignals`, and what they have asked for.

    looked: at the drafts. asked_entropy: for the entropy.
    """

    def __init__(self, text: TracedText, index: int, policy: TreePolicy) -> None:
        self._text, self._index = text, index
        self._drafts, weighed = policy.asked_drafts(text.conditional is not None)
        self._weighs = text.conditional if weighed else None
        self.looked = self.asked_entropy = False

    @property
    def hidden(self) -> Tensor:
        return self._text.hidden[self._index : self._index + 1]

    def entropy(self) -> float:
        self.asked_entropy = True
        return self._text.entropy[self._index]

    def drafts(self) -> HeadsDrafts:
        self.looked = True
        tables = self._text.ids, self._text.logprobs
        ids, logprobs = (table[self._index, :, : self._drafts].contiguous() for table in tables)
        after = None if self._weighs is None else self._weighs.for_search(ids[None], logprobs[None])
        return HeadsDrafts(ids.numpy(), logprobs.numpy(), after)


def walk(
    texts: Iterable[TracedText],
    policy: TreePolicy,
    gate: Gate,
    costs: StepCosts,
    proposers: Sequence[ProposerFactory] | None = None,
) -> Tally:
    """The steps of `decode(..., tree=policy, gate=gate, proposers=proposers)` through the texts.

    policy: one that looks at the drafts, or without any. The gate itself is asked, at every step, and the proposers
    draft from the text as far as it is known by then.
    """
    tally, makers = Tally(), policy.default_proposers() if proposers is None else proposers
    for text in texts:
        known = text.prompt + 1  # the prompt's forward has brought the first token
        asked = [make_proposer(maker, number, text.tokens[:known]) for number, maker in enumerate(makers)]
        trees = policy.begin(asked, text.vocabulary)
        step = partial(_step, tally, text, policy, gate, trees, costs)
        tally.accepted.update(steps_through(len(text), step))
        tally.tokens += len(text)
    return tally


def _step(
    tally: Tally, text: TracedText, policy: TreePolicy, gate: Gate, trees: Trees, costs: StepCosts,
    index: int,
) -> int:  # fmt: skip
    """Adds the step at a place; returns how many drafts it accepts."""
    place, context, max_depth = Place(text, index, policy), text.prompt + index, text.deepest[index]
    tree = propose(place, policy, gate, trees, max_depth)
    accepted = accepted_by(tree, text.tokens[context + 1 : context + 1 + max_depth])
    tally.seconds += costs.seconds(tree.size, context, place.looked, place.asked_entropy)
    tally.steps += 1
    tally.nodes += tree.size
    if tree.size > 1:
        tally.open_steps += 1
        tally.zero_accept_steps += accepted == 0
        tally.expected.append((float(tree.expected_tokens[-1]), accepted + 1))
    trees.extend(text.tokens[context + 1 : context + accepted + 2])
    return accepted


def accepted_lengths(text: TracedText, policy: TreePolicy) -> list[int]:
    """Per place: how many drafts of the heads alone a step with a tree of `policy` accepts."""
    trees, found = policy.begin((), text.vocabulary), []
    for index, deepest in enumerate(text.deepest):
        context = text.prompt + index
        place = Place(text, index, policy)
        ahead = text.tokens[context + 1 : context + 1 + deepest]
        found.append(accepted_by(trees.grow(place, deepest, False), ahead) if deepest else 0)
    return found


def accepted_by(tree: Tree, ahead: Sequence[int]) -> int:
    """How many drafts of a tree are accepted where the text goes on with `ahead` behind node 0."""
    node = depth = 0
    # A node's children come behind it, and no two of them are the same token.
    for child, (parent, token) in enumerate(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True)):
        if child and depth < len(ahead) and parent == node and token == ahead[depth]:
            node, depth = child, depth + 1
    return depth
