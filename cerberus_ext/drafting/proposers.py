"""Where drafts come from: a small protocol, and how a step asks everyone who follows it.

The heads are one proposer (`HeadsProposer`), the text's own past is another (suffix.py); README has a third one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _host
from ..io.checks import call
from .conditional import ConditionalLogprobs
from .platt import PlattScaling


class Proposer(Protocol):
    """Drafts how one text goes on. It never changes the text: what it drafts wrong is not taken."""

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these, at least one; the last one is now the pending token."""

    def propose(self, max_depth: int) -> tuple[ArrayLike, ArrayLike]:
        """Up to `max_depth` tokens behind the text -> tokens, integers, and probabilities, in 0..1, of one shape.

        (n,): a path. probabilities[i]: that tokens[i] is right, where those before it are. n = 0: no draft.
        (n, P): P drafts at each depth, best first, whatever the drafts before it are.
        """


# Called with the prompt's tokens, the first generated one behind them: a proposer for this text.
ProposerFactory = Callable[[list[int]], Proposer]


class Drafts(NamedTuple):
    """What a proposer has drafted: tokens int64 and probabilities float64, of one shape, (n,) or (n, P)."""

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]


_NONE = Drafts(np.empty((0, 0), np.int64), np.empty((0, 0), np.float64))


class HeadsDrafts(NamedTuple):
    """What the heads draft at one step: ids, logprobs (K, P), on the host. conditional: None where a head's drafts do
    not depend on the token before."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    conditional: ConditionalLogprobs | None = None


class HeadsSignals(Protocol):
    """Who has the heads' drafts; a Stepper is one."""

    def drafts(self) -> HeadsDrafts: ...


class HeadsProposer:
    """The heads as a proposer. They read the step's hidden state, not the tokens.

    vocabulary: of the model, in tokens. platt: (slope, shift) of every head, see platt.py; None:
    probabilities are taken as they are. Heads whose numbers have overflown draft nothing: what is no token, or has a
    probability that is 0 or no number, gets probability 0, with which nothing becomes a draft.
    """

    def __init__(
        self, step: HeadsSignals, vocabulary: int, platt: PlattScaling | NDArray[np.float64] | None = None
    ) -> None:
        self._step = step
        self._vocabulary = vocabulary
        self._platt = None if platt is None else np.asarray(platt, np.float64).reshape(-1, 2)
        self._drafted: HeadsDrafts | None = None

    def extend(self, tokens: list[int]) -> None:
        pass

    def propose(self, max_depth: int) -> Drafts:
        ids, logprobs, _ = self._drafted = self._step.drafts()
        if not ids.size:  # no tree has any of theirs
            return _NONE
        return Drafts(*_host.read_drafts(ids, logprobs, self._platt, self._vocabulary, max_depth))

    def conditional(self, number: int) -> _host.HeadDrafts | None:
        """After `propose`: what `_host.best_drafts` weighs these drafts by, where their proposer has this number."""
        if self._drafted is None or self._drafted.conditional is None:
            return None
        tables, logprobs = self._drafted.conditional
        return tables, self._drafted.ids, self._drafted.logprobs, logprobs, self._platt, number


class DraftTable(NamedTuple):
    """The (n, P) drafts of several proposers as one table. All (n, P); proposers: who makes each draft."""

    tokens: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    proposers: NDArray[np.int64]


def make_proposer(maker: ProposerFactory, number: int, text: list[int]) -> Proposer:
    """A proposer for `text`. number: the maker's place in decode's `proposers`. Raises TypeError where it is none."""
    proposer: Any = maker
    # A class makes what has its methods. One that has not, SuffixProposer say, would take the text for its settings.
    if not isinstance(maker, type) or _proposes(maker):
        proposer = call(f"decode: proposers[{number}]", maker, text)
    if not _proposes(proposer):
        raise TypeError(
            f"decode: proposers[{number}] must make what has extend and propose, see Proposer,"
            f" got {maker.__name__ if isinstance(maker, type) else type(proposer).__name__}"
        )
    return proposer


def _proposes(proposer: Any) -> bool:
    return all(callable(getattr(proposer, name, None)) for name in ("extend", "propose"))


def ask_proposer(proposer: Proposer, max_depth: int) -> Drafts:
    """Its drafts, checked for their form; `check_values` is for where they turn out wrong. Raises ValueError."""
    name = type(proposer).__name__
    answer: Any = call(f"decode: proposers: {name}.propose", proposer.propose, max_depth)
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise ValueError(
            f"decode: proposers: {name}.propose must return (tokens, probabilities), got {type(answer).__name__}"
        )
    try:
        tokens, probabilities = np.asarray(answer[0]), np.asarray(answer[1])
    except (ValueError, TypeError, RuntimeError) as error:  # lists of several lengths; tensors of a GPU, of bfloat16
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
    return Drafts(
        tokens[:max_depth].astype(np.int64, copy=False), probabilities[:max_depth].astype(np.float64, copy=False)
    )


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


def join_tables(tables: Sequence[tuple[Drafts, int]]) -> DraftTable:
    """(n, P) drafts and who makes them, as one table: at each depth all drafts, best first.

    Where a proposer drafts less deep than others do, its probabilities are 0 at the rest.
    """
    if len(tables) < 2:
        (drafts, number), *_ = tables or [(_NONE, 0)]
        return DraftTable(*drafts, np.full(drafts.tokens.shape, number, np.int64))
    depth = max((len(drafts.tokens) for drafts, _ in tables))
    shape = depth, sum(drafts.tokens.shape[1] for drafts, _ in tables)
    tokens, probabilities, proposers = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.int64)
    begin = 0
    for drafts, number in tables:
        depth, count = drafts.tokens.shape
        tokens[:depth, begin : begin + count] = drafts.tokens
        probabilities[:depth, begin : begin + count] = drafts.probabilities
        proposers[:, begin : begin + count] = number
        begin += count
    order = np.argsort(-probabilities, axis=1, kind="stable")
    return DraftTable(*(np.take_along_axis(part, order, 1) for part in (tokens, probabilities, proposers)))
