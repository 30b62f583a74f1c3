"""Where guesses come from: a small protocol, and how a step asks everyone who follows it.

The heads are one source (`HeadsSource`), the text's own past is another (suffix.py). A third takes a few lines; this
one guesses that the last token is said again, three times in ten:

    class Stutter:
        def __init__(self, prompt):
            self.last = prompt[-1]

        def extend(self, tokens):
            self.last = tokens[-1]

        def guess(self, most):
            return [self.last] * most, [0.3] * most

    decode(model, heads, ids, sources=[Stutter])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .platt import Corrections, reading


class DraftSource(Protocol):
    """Guesses how one text goes on. It never changes the text: what it guesses wrong is not taken."""

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these, at least one; the last one is now the root of the next tree."""

    def guess(self, most: int) -> tuple[ArrayLike, ArrayLike]:
        """Up to `most` places behind the text -> tokens, integers, and chances, in 0..1, of one shape.

        (n,): a path. chances[i]: that tokens[i] is right, where those before it are. n = 0: no guess.
        (n, P): P guesses for each place, best first, whatever the guesses before it are.
        """


# Called with the prompt's tokens, the first generated one behind them: a source for this text.
SourceMaker = Callable[[list[int]], DraftSource]


class Guesses(NamedTuple):
    """What a source has guessed: tokens int64 and chances float64, of one shape, (n,) or (n, P)."""

    tokens: NDArray[np.int64]
    chances: NDArray[np.float64]


class HeadsSignals(Protocol):
    """Who has the heads' guesses; a Stepper is one."""

    def guesses(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids, logprobs (K, P), on the host."""


class HeadsSource:
    """The heads as a source. They read the step's hidden state, not the tokens.

    vocabulary: of the model, in tokens. corrections: (slope, shift) of every head, see ConfidenceGate; None:
    probabilities are taken as they are. Heads whose numbers have overflown guess nothing: what is no token, or has a
    probability that is 0 or no number, gets chance 0, with which nothing becomes a draft.
    """

    def __init__(self, step: HeadsSignals, vocabulary: int, corrections: Corrections | None = None) -> None:
        self._step = step
        self._vocabulary = vocabulary
        self._read = reading(corrections)

    def extend(self, tokens: list[int]) -> None:
        pass

    def guess(self, most: int) -> tuple[ArrayLike, ArrayLike]:
        ids, logprobs = self._step.guesses()
        chances = self._read(np.minimum(logprobs.astype(np.float64), 0.0))
        missing = (ids < 0) | (ids >= self._vocabulary) | (chances == 0)
        if missing.any():
            last = np.argsort(missing, axis=1, kind="stable")
            ids, chances, missing = (np.take_along_axis(part, last, 1) for part in (ids, chances, missing))
            ids, chances = np.where(missing, 0, ids), np.where(missing, 0.0, chances)
        # A correction that turns the order round would say that a head knows nothing: then all its guesses are alike.
        return ids[:most], np.minimum.accumulate(chances, axis=1)[:most]


class Places(NamedTuple):
    """The (n, P) guesses of several sources as one table. All (n, P); sources: who makes each guess."""

    tokens: NDArray[np.int64]
    chances: NDArray[np.float64]
    sources: NDArray[np.int64]


def make_source(maker: SourceMaker, number: int, text: list[int]) -> DraftSource:
    """A source for `text`. number: the maker's place in decode's `sources`. Raises TypeError where it is none."""
    source: Any = maker(text)
    if not all(callable(getattr(source, name, None)) for name in ("extend", "guess")):
        raise TypeError(
            f"decode: sources[{number}] must make what has extend and guess, see DraftSource,"
            f" got {type(source).__name__}"
        )
    return source


def ask_source(source: DraftSource, most: int) -> Guesses:
    """Its guesses, checked for their form; `check_values` is for where they turn out wrong. Raises ValueError."""
    name = type(source).__name__
    found: Any = source.guess(most)
    if not isinstance(found, tuple) or len(found) != 2:
        raise ValueError(f"decode: sources: {name}.guess must return (tokens, chances), got {type(found).__name__}")
    try:
        tokens, chances = np.asarray(found[0]), np.asarray(found[1])
    except ValueError as error:  # nested lists of several lengths
        raise ValueError(f"decode: sources: {name}.guess must return two arrays: {error}") from error
    if tokens.size == 0:
        return Guesses(np.empty(0, np.int64), np.empty(0, np.float64))
    if tokens.dtype.kind not in "iu" or chances.dtype.kind not in "fiu":
        raise ValueError(
            f"decode: sources: {name}.guess must return integers and numbers, got {tokens.dtype} and {chances.dtype}"
        )
    if tokens.shape != chances.shape or tokens.ndim not in (1, 2):
        raise ValueError(
            f"decode: sources: {name}.guess must return tokens and chances of one shape, (n,) or (n, P),"
            f" got {tokens.shape} and {chances.shape}"
        )
    if tokens.ndim == 2 and (chances[:, 1:] > chances[:, :-1]).any():
        raise ValueError(f"decode: sources: {name}.guess must return the guesses of each place best first, got others")
    return Guesses(tokens[:most].astype(np.int64), chances[:most].astype(np.float64))


def check_values(source: DraftSource, guesses: Guesses, vocabulary: int) -> None:
    """Raises ValueError where it has guessed what is no token of the model, or with a chance that is none."""
    name, (tokens, chances) = type(source).__name__, guesses
    if (wrong := (tokens < 0) | (tokens >= vocabulary)).any():
        raise ValueError(
            f"decode: sources: {name}.guess must return tokens in 0..{vocabulary - 1}, got {tokens[wrong][0]}"
        )
    if (wrong := ~((chances >= 0) & (chances <= 1))).any():  # NaN, too
        raise ValueError(f"decode: sources: {name}.guess must return chances in 0..1, got {chances[wrong][0]}")


def join_places(tables: Sequence[tuple[Guesses, int]]) -> Places:
    """(n, P) guesses and who makes them, as one table: of each place all guesses, best first.

    Where a source guesses fewer places than others do, its chances are 0 at the rest.
    """
    if len(tables) == 1:
        (one, number), *_ = tables
        return Places(*one, np.full(one.tokens.shape, number, np.int64))
    shape = (max((len(one.tokens) for one, _ in tables), default=0), sum(one.tokens.shape[1] for one, _ in tables))
    tokens, chances, sources = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, np.int64)
    begin = 0
    for one, number in tables:
        places, guesses = one.tokens.shape
        tokens[:places, begin : begin + guesses] = one.tokens
        chances[:places, begin : begin + guesses] = one.chances
        sources[:, begin : begin + guesses] = number
        begin += guesses
    order = np.argsort(-chances, axis=1, kind="stable")
    return Places(*(np.take_along_axis(part, order, 1) for part in (tokens, chances, sources)))
