"""Tokens as they come -> text as it may be shown: whole characters, and nothing that may yet be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class Words:
    """The text of one answer.

    special: special tokens are part of it. stopped: one of `stops` has come: the text ends before it. tokens: taken so
    far, that of the stop included. length: characters that these have made, also such as may not be shown yet.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), *, special: bool = False) -> None:
        self.stopped = False
        self.tokens = self.length = 0
        self._tokenizer, self._skip = tokenizer, not special
        self._stops = tuple(stops)
        self._seen: list[int] = []  # the tokens of the last whole piece, which tell how the next ones read, and these
        self._known = 0  # how many of them are in `_read`
        self._read = ""  # how those read
        self._held = ""  # may be the beginning of a stop string

    def add(self, token: int) -> str:
        """What may be shown now. Not after `stopped`."""
        self.tokens += 1
        self._seen.append(token)
        text = self._decode(self._seen)
        if text.endswith(_UNFINISHED):
            return ""
        return self._show(self._new(text))

    def end(self) -> str:
        """What is left where no stop string came any more."""
        if self.stopped:
            return ""
        shown = self._show(self._new(self._decode(self._seen)))
        return shown if self.stopped else shown + self._held

    def _new(self, text: str) -> str:
        """What the tokens behind those that are known add to them."""
        new = text[len(self._read) :]
        if read := self._decode(self._seen[self._known :]):  # behind special tokens alone others would read otherwise
            self._seen, text = self._seen[self._known :], read
        self._known, self._read = len(self._seen), text
        self.length += len(new)
        return new

    def _show(self, new: str) -> str:
        self._held += new
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        whole = len(self._held) - self._open()
        shown, self._held = self._held[:whole], self._held[whole:]
        return shown

    def _open(self) -> int:
        """How many of the last characters a stop string may begin with."""
        longest = max(map(len, self._stops), default=0) - 1
        ends = (count for count in range(min(longest, len(self._held)), 0, -1))
        return next((n for n in ends if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skip)) if tokens else ""


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """How a text, special tokens included, grows with each token. A character that several make comes with the last."""
    words = Words(tokenizer, special=True)
    pieces = [words.add(token) for token in tokens]
    return [*pieces[:-1], pieces[-1] + words.end()] if pieces else []
