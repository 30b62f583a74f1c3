"""One of the answers to a request, while it is generated and afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING

from ..io.words import Words
from .engine import Job

if TYPE_CHECKING:
    from torch import Tensor

    from ..runtime.stats import DecodeStats


class Choice:
    """text: so far. finish: "stop" (an end token, a stop string) or "length"; None: it goes on."""

    def __init__(self, job: Job, words: Words, ends: frozenset[int]) -> None:
        self.text = ""
        self.finish: str | None = None
        self._job, self._words, self._ends = job, words, ends

    async def pieces(self) -> AsyncIterator[str]:
        """What may be shown, as it comes. However this ends, so does the job."""
        last = None
        try:
            async with aclosing(self._job.tokens()) as chunks:
                async for chunk in chunks:
                    shown = ""
                    for last in chunk:
                        shown += self._words.add(last)
                        if self._words.stopped:
                            break
                    if shown:
                        self.text += shown
                        yield shown
                    if self._words.stopped:
                        break
            if rest := self._words.end():
                self.text += rest
                yield rest
            self.finish = "stop" if self._words.stopped or last in self._ends else "length"
        finally:
            self._job.cancel()

    def cancel(self) -> None:
        """Nobody reads it any more."""
        self._job.cancel()

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
