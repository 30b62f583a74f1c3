"""Decoding without a model: the steps that `decode` would take through texts that are known, and their time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory, make_proposer
from ..drafting.tree import Tree, TreePolicy, Trees, filled_size
from ..engine.checks import check_proposers
from ..engine.loop import propose
from ..runtime.stats import StepCounts
from .cost import StepCosts
from .trace import TracedText


@dataclass
class Tally(StepCounts):
    """What the steps through some texts come to. The first token of a text comes with the prompt, without a step.

    tokens    those that are in the texts: a last step that goes beyond the end is counted as far as the end
    nodes     that the steps' forwards checked, the roots included
    accepted  [a]: steps that accepted a drafts
    promises  of every step with a tree of its own: tokens that it promised to gain, and those that it gained
    """

    tokens: int = 0
    nodes: int = 0
    seconds: float = 0.0
    accepted: Counter[int] = field(default_factory=Counter)
    promises: list[tuple[float, int]] = field(default_factory=list)

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

    def __iadd__(self, other: Tally) -> Tally:
        for name in ("tokens", "nodes", "steps", "open_steps", "zero_accept_steps", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.accepted.update(other.accepted)
        self.promises += other.promises
        return self


class _Place:
    """What a gate or a tree may want to see at one place of a text, see `loop.StepSignals`, and what they have asked for.

    looked: at the drafts. asked_entropy: for the entropy.
    """

    def __init__(self, text: TracedText, drafts: int) -> None:
        """drafts: of each head that any tree uses."""
        self._text = text
        self.max_drafts = drafts
        self._logprobs = text.logprobs[:, :, :drafts]
        self._tables = text.ids[:, :, :drafts].numpy(), self._logprobs.numpy()
        self.go_to(0)

    def go_to(self, index: int) -> None:
        self.index, self.looked, self.asked_entropy = index, False, False

    @property
    def hidden(self) -> Tensor:
        return self._text.hidden[self.index : self.index + 1]

    def entropy(self) -> float:
        self.asked_entropy = True
        return self._text.entropy[self.index]

    def drafts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        self.looked = True
        ids, logprobs = self._tables
        return ids[self.index], logprobs[self.index]


def walk(
    texts: Iterable[TracedText],
    tree: TreePolicy,
    gate: Gate,
    costs: StepCosts,
    proposers: Sequence[ProposerFactory] | None = None,
) -> Tally:
    """The steps of `decode(..., tree=tree, gate=gate, proposers=proposers)` through the texts.

    The gate itself is asked, at every step, and the proposers draft from the text as far as it is known by then. Where
    the costs are of compiled steps, a step costs what the compiled one does that its tree is filled up to.
    Raises ValueError where there are proposers for a StaticPolicy.
    """
    check_proposers(proposers)
    tally, makers = Tally(), tree.default_proposers() if proposers is None else proposers
    sizes = tree.sizes if costs.compiled else ()
    for text in texts:
        known = text.prompt + 1  # the prompt's forward has brought the first token
        tree.check(text.logprobs.shape[1], proposers)
        asked = [make_proposer(maker, number, text.tokens[:known]) for number, maker in enumerate(makers)]
        trees = tree.begin(asked, text.vocabulary)
        _walk_text(tally, text, _Place(text, tree.useful_drafts), tree, trees, gate, costs, sizes)
    return tally


def _walk_text(
    tally: Tally,
    text: TracedText,
    place: _Place,
    policy: TreePolicy,
    trees: Trees,
    gate: Gate,
    costs: StepCosts,
    sizes: Collection[int],
) -> None:
    """Adds the steps through one text. trees: as `decode` has them at its beginning. sizes: of compiled steps."""
    while place.index < len(text):
        index = place.index
        deepest = text.deepest[index] if place.max_drafts else 0
        chosen = propose(place, policy, gate, trees, deepest)
        context = text.prompt + index
        accepted = accepted_by(chosen, text.tokens[context + 1 : context + 1 + deepest], text.ranks[index])
        if chosen.size > 1 and not np.isnan(chosen.probabilities[-1]):
            tally.promises.append((float(chosen.expected_tokens[-1]), accepted + 1))
        size = filled_size(chosen.size, sizes)
        tally.seconds += costs.seconds(size, context, place.looked, place.asked_entropy)
        tally.steps += 1
        tally.nodes += chosen.size
        tally.open_steps += chosen.size > 1
        tally.zero_accept_steps += chosen.size > 1 and accepted == 0
        tally.accepted[accepted] += 1
        place.go_to(index + accepted + 1)
        trees.extend(text.tokens[context + 1 : context + accepted + 2])
    tally.tokens += len(text)


def accepted_by(tree: Tree, ahead: Sequence[int], ranks: Sequence[int]) -> int:
    """How many drafts of a tree are accepted where the text goes on with `ahead` behind node 0.

    ranks: where the right token stands among every head's drafts, for trees that name their nodes so.
    """
    named, right = (tree.tokens, ahead) if tree.ranks is None else (tree.ranks, ranks)
    node = depth = 0
    # A node's children come behind it, and no two of them are the same token.
    for child, (parent, draft) in enumerate(zip(tree.parents.tolist(), named.tolist(), strict=True)):
        if child and depth < len(right) and parent == node and draft == right[depth]:
            node, depth = child, depth + 1
    return depth
