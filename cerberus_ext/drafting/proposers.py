"""Where drafts come from: a small protocol, and how a step asks everyone who follows it.

The heads are one proposer (`HeadsProposer`), the text's own past is another (suffix.py). A third takes a few lines;
this one drafts that the last token is said again, three times in ten:

    class Stutter:
        def __init__(self, prompt):
            self.last = prompt[-1]

        def extend(self, tokens):
            self.last = tokens[-1]

        def propose(self, most):
            return [self.last] * most, [0.3] * most

    decode(model, heads, ids, proposers=[Stutter])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .platt import PlattScaling, reading


class Proposer(Protocol):
    """Drafts how one text goes on. It never changes the text: what it drafts wrong is not taken."""

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these, at least one; the last one is now the pending token."""

    def propose(self, most: int) -> tuple[ArrayLike, ArrayLike]:
        """Up to `most` places behind the text -> tokens, integers, and probabilities, in 0..1, of one shape.

        (n,): a path. probabilities[i]: that tokens[i] is right, where those before it are. n = 0: no draft.
        (n, P): P drafts for each place, best first, whatever the drafts before it are.
        """


# Called with the prompt's tokens, the first generated one behind them: a proposer for this text.
ProposerFactory = Callable[[list[int]], Proposer]


class Drafts(NamedTuple):
    """What a proposer has drafted: tokens int64 and probabilities float64, of one shape, (n,) or (n, P)."""

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]


class HeadsSignals(Protocol):
    """Who has the heads' drafts; a Stepper is one."""

    def drafts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids, logprobs (K, P), on the host."""


class HeadsProposer:
    """The heads as a proposer. They read the step's hidden state, not the tokens.

    vocabulary: of the model, in tokens. platt: (slope, shift) of every head, see ConfidenceGate; None:
    probabilities are taken as they are. Heads whose numbers have overflown draft nothing: what is no token, or has a
    probability that is 0 or no number, gets probability 0, with which nothing becomes a draft.
    """

    def __init__(self, step: HeadsSignals, vocabulary: int, platt: PlattScaling | None = None) -> None:
        self._step = step
        self._vocabulary = vocabulary
        self._read = reading(platt)

    def extend(self, tokens: list[int]) -> None:
        pass

    def propose(self, most: int) -> tuple[ArrayLike, ArrayLike]:
        ids, logprobs = self._step.drafts()
        probabilities = self._read(np.minimum(logprobs.astype(np.float64), 0.0))
        missing = (ids < 0) | (ids >= self._vocabulary) | (probabilities == 0)
        if missing.any():
            last = np.argsort(missing, axis=1, kind="stable")
            ids, probabilities, missing = (np.take_along_axis(part, last, 1) for part in (ids, probabilities, missing))
            ids, probabilities = np.where(missing, 0, ids), np.where(missing, 0.0, probabilities)
        # A correction that turns the order round would say that a head knows nothing: then all its drafts are alike.
        return ids[:most], np.minimum.accumulate(probabilities, axis=1)[:most]


class Places(NamedTuple):
    """The (n, P) drafts of several proposers as one table. All (n, P); proposers: who makes each draft."""

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    proposers: NDArray[np.int64]


def make_proposer(maker: ProposerFactory, number: int, text: list[int]) -> Proposer:
    """A proposer for `text`. number: the maker's place in decode's `proposers`. Raises TypeError where it is none."""
    proposer: Any = maker(text)
    if not all(callable(getattr(proposer, name, None)) for name in ("extend", "propose")):
        raise TypeError(
            f"decode: proposers[{number}] must make what has extend and draft, see Proposer,"
            f" got {type(proposer).__name__}"
        )
    return proposer


def ask_proposer(proposer: Proposer, most: int) -> Drafts:
    """Its drafts, checked for their form; `check_values` is for where they turn out wrong. Raises ValueError."""
    name = type(proposer).__name__
    found: Any = proposer.propose(most)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(
            f"decode: proposers: {name}.propose must return (tokens, probabilities), got {type(found).__name__}"
        )
    try:
        tokens, probabilities = np.asarray(found[0]), np.asarray(found[1])
    except ValueError as error:  # nested lists of several lengths
        raise ValueError(f"decode: proposers: {name}.propose must return two arrays: {error}") from error
    if tokens.size == 0:
        return Drafts(np.empty(0, np.int64), np.empty(0, np.float64))
    if tokens.dtype.kind not in "iu" or probabilities.dtype.kind not in "fiu":
        raise ValueError(
            f"decode: proposers: {name}.propose must return integers and numbers, got {tokens.dtype} and"
            f" {probabilities.dtype}"
        )
    if tokens.shape != probabilities.shape or tokens.ndim not in (1, 2):
        raise ValueError(
            f"decode: proposers: {name}.propose must return tokens and probabilities of one shape, (n,) or (n, P),"
            f" got {tokens.shape} and {probabilities.shape}"
        )
    if tokens.ndim == 2 and (probabilities[:, 1:] > probabilities[:, :-1]).any():
        raise ValueError(
            f"decode: proposers: {name}.propose must return the drafts of each place best first, got others"
        )
    return Drafts(tokens[:most].astype(np.int64), probabilities[:most].astype(np.float64))


def check_values(proposer: Proposer, drafts: Drafts, vocabulary: int) -> None:
    """Raises ValueError where it has drafted what is no token of the model, or with a probability that is none."""
    name, (tokens, probabilities) = type(proposer).__name__, drafts
    if (wrong := (tokens < 0) | (tokens >= vocabulary)).any():
        raise ValueError(
            f"decode: proposers: {name}.propose must return tokens in 0..{vocabulary - 1}, got {tokens[wrong][0]}"
        )
    if (wrong := ~((probabilities >= 0) & (probabilities <= 1))).any():  # NaN, too
        raise ValueError(
            f"decode: proposers: {name}.propose must return probabilities in 0..1, got {probabilities[wrong][0]}"
        )


def join_places(tables: Sequence[tuple[Drafts, int]]) -> Places:
    """(n, P) drafts and who makes them, as one table: of each place all drafts, best first.

    Where a proposer drafts fewer places than others do, its probabilities are 0 at the rest.
    """
    if len(tables) == 1:
        (one, number), *_ = tables
        return Places(*one, np.full(one.tokens.shape, number, np.int64))
    shape = (max((len(one.tokens) for one, _ in tables), default=0), sum(one.tokens.shape[1] for one, _ in tables))
    tokens, probabilities, proposers = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.int64)
    begin = 0
    for one, number in tables:
        places, drafts = one.tokens.shape
        tokens[:places, begin : begin + drafts] = one.tokens
        probabilities[:places, begin : begin + drafts] = one.probabilities
        proposers[:, begin : begin + drafts] = number
        begin += drafts
    order = np.argsort(-probabilities, axis=1, kind="stable")
    return Places(*(np.take_along_axis(part, order, 1) for part in (tokens, probabilities, proposers)))
