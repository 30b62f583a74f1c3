"""Trees new at every step, of the drafts that are most likely to be right.

A node is as likely to be accepted as the product of the probabilities on its path says; the most likely nodes are
taken, one after the other (csrc/search/draft_search.h), so that the first n nodes of a tree are the best of n nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import _host
from ..io.checks import call, check_integer
from .proposers import (
    HeadsProposer,
    HeadsSignals,
    Proposer,
    ProposerFactory,
    ask_proposer,
    check_values,
    join_tables,
)
from .suffix import SuffixProposer
from .tree import ALONE, HEADS, MAX_NODES, Tree, TreePolicy

MAX_DRAFTS = 32  # that `ops.draft_topk` gives
# Of steps with fewer nodes than the largest tree. Each takes a while to record, so powers of two, without 2.
_MIN_FILLED = 4


@dataclass(frozen=True)
class DynamicPolicy(TreePolicy):
    """Every step verifies the `size` most likely nodes, the pending token included, of what the proposers draft.

    size: 2..1024. drafts: of each head that compete, 1..32; of more than size - 1 none could win.
    platt: (slope, shift) of every head, where its probabilities p are to be read as
        sigmoid(slope * logit(p) + shift); None: as they are.
    """

    size: int
    drafts: int = MAX_DRAFTS
    platt: tuple[tuple[float, float], ...] | None = None
    looks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer("DynamicPolicy: size", self.size, 2, MAX_NODES)
        check_integer("DynamicPolicy: drafts", self.drafts, 1, MAX_DRAFTS)
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

    def asked_drafts(self, conditional: bool) -> tuple[int, bool]:
        """Late drafts may win where the token before speaks for them. A tree of one draft has no such token."""
        weighed = conditional and self.size > 2
        return self.drafts if weighed else self.useful_drafts, weighed

    @property
    def sizes(self) -> tuple[int, ...]:
        powers = (1 << bits for bits in range(_MIN_FILLED.bit_length() - 1, self.size.bit_length()))
        return 1, *(power for power in powers if power < self.size), self.size

    def check(self, num_heads: int, proposers: Sequence[ProposerFactory] | None) -> None:
        if self.platt is not None and len(self.platt) != num_heads:
            raise ValueError(
                f"decode: tree must have a correction for each of the {num_heads} heads, or None, got {len(self.platt)}"
            )

    def default_proposers(self) -> tuple[ProposerFactory, ...]:
        return (SuffixProposer(),)

    def begin(self, proposers: Sequence[Proposer], vocabulary: int) -> DynamicTrees:
        return DynamicTrees(self, proposers, vocabulary)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class DynamicTrees:
    """Grows the trees of one text."""

    def __init__(self, policy: DynamicPolicy, proposers: Sequence[Proposer], vocabulary: int) -> None:
        self._policy = policy
        self._platt = None if policy.platt is None else np.array(policy.platt)  # once, and not at every step
        self._proposers = tuple(proposers)
        self._vocabulary = vocabulary

    def extend(self, tokens: list[int]) -> None:
        for proposer in self._proposers:
            call(f"decode: proposers: {type(proposer).__name__}.extend", proposer.extend, tokens)

    def grow(self, heads: HeadsSignals | None, max_depth: int, weighed: bool, least: float = 0.0) -> Tree:
        depth = min(max_depth, self._policy.size - 1)
        others = [ask_proposer(proposer, depth) for proposer in self._proposers]
        drafts = list(enumerate(others, start=HEADS + 1))
        conditional = None
        if heads is not None and not any(_fills(part.probabilities, self._policy.size - 1) for part in others):
            own = HeadsProposer(heads, self._vocabulary, self._platt)
            drafts.insert(0, (HEADS, own.propose(depth)))
            conditional = own.conditional(HEADS)
        # The likeliest of depth 1 comes first, and nothing deeper is likelier than what it stands below.
        best = max((part.probabilities.item(0) for _, part in drafts if part.tokens.size), default=0.0)
        if 0.0 <= best < least:
            return ALONE
        table = join_tables([(part, number) for number, part in drafts if part.tokens.ndim == 2])
        paths = [(*part, number) for number, part in drafts if part.tokens.ndim == 1 and part.tokens.size]
        try:
            size = self._policy.size
            return Tree(*_host.best_drafts(*table, paths, self._vocabulary, size, depth, conditional))
        except ValueError:
            for proposer, part in zip(self._proposers, others, strict=True):
                check_values(proposer, part, self._vocabulary)  # says whose they are
            raise


def _fills(path: NDArray[np.float64], places: int) -> bool:
    """Whether a path with these probabilities takes all places of a tree, whatever else is drafted: what it leaves to
    others after each of its nodes is no more than its last node's."""
    if path.ndim != 1 or len(path) < places:
        return False
    accepted = np.cumprod(path[:places])
    left = np.append(1.0, accepted[:-1]) - accepted
    return bool(left.max() <= accepted[-1])
