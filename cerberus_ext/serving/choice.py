"""One of the answers to a request, while it is generated and afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..io.words import Words
from .engine import Job
from .logprobs import Entry, Spellings

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.stats import DecodeStats


@dataclass(frozen=True)
class Piece:
    """entries: log-probabilities of the tokens that begin in it, where they are asked for."""

    text: str = ""
    entries: tuple[Entry, ...] = ()


class Choice:
    """text, entries: so far. finish: "stop" (an end token, a stop string) or "length"; None: it goes on."""

    def __init__(self, job: Job, words: Words, ends: frozenset[int], spellings: Spellings) -> None:
        self.text = ""
        self.entries: list[Entry] = []
        self.finish: str | None = None
        self._job, self._words, self._ends, self._spellings = job, words, ends, spellings
        self._next: list[Entry] = []  # of tokens whose text may not be shown yet

    async def pieces(self) -> AsyncIterator[Piece]:
        """What may be shown, as it comes. However this ends, so does the job."""
        last = None
        try:
            async with aclosing(self._job.tokens()) as chunks:
                async for chunk in chunks:
                    shown = ""
                    for last in chunk:
                        self._look_up(last)
                        shown += self._words.add(last)
                        if self._words.stopped:
                            break
                    if shown:
                        yield self._piece(shown)
                    if self._words.stopped:
                        break
            piece = self._piece(self._words.end(), to_the_end=not self._words.stopped)
            if piece.text or piece.entries:
                yield piece
            self.finish = "stop" if self._words.stopped or last in self._ends else "length"
        finally:
            self._job.cancel()

    def _look_up(self, token: int) -> None:
        """Before the token becomes text. That at which the answer ends has none."""
        logprobs = self._job.logprobs
        if logprobs is not None and token not in self._ends:
            found = logprobs.found[self._words.tokens]
            own, *best = [(self._spellings.of(other), logprob) for other, logprob in found]
            self._next.append(Entry(self._words.length, own, best))

    def _piece(self, text: str, to_the_end: bool = False) -> Piece:
        self.text += text
        entries = tuple(entry for entry in self._next if to_the_end or entry.offset < len(self.text))
        del self._next[: len(entries)]
        self.entries += entries
        return Piece(text, entries)

    def cancel(self) -> None:
        """Nobody reads it any more."""
        self._job.cancel()

    @property
    def logprobs(self) -> bool:
        """Whether they are asked for."""
        return self._job.logprobs is not None

    @property
    def ids(self) -> Tensor:
        return self._job.ids

    @property
    def stats(self) -> DecodeStats | None:
        """None before it has begun."""
        return self._job.stats

    @property
    def tokens(self) -> int:
        return self._words.tokens

    @property
    def reused(self) -> int:
        """Tokens of the prompt that were not read again."""
        return self.stats.reused_tokens if self.stats else 0

    @property
    def drafted(self) -> int:
        return sum(nodes - 1 for nodes, _ in self.stats.trace) if self.stats else 0

    @property
    def accepted(self) -> int:
        return sum(len(path) for _, path in self.stats.trace) if self.stats else 0
