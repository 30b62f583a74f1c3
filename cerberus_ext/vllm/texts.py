"""Which request a row of vLLM's batch belongs to, told by its tokens alone: rows move, and are used again.

An index depends on its tokens and on nothing else. So a row may go on with any index whose tokens it begins with, and
one that has to be made again costs time, about a microsecond per token, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..drafting.suffix import SuffixProposer

# Tokens of texts without a row that are remembered, of requests that were preempted and of chats that go on. An index
# has about 100 bytes per token: some 50 MB.
_MAX_WAITING = 1 << 19
# A text's probabilities are lowered as far as its last drafts have kept less than these promised.
_KEPT = 0.97  # of what earlier drafts say, at every step
_TRIES = 2.0  # so many expected drafts count as much as the expectation alone
_NO_TOKEN = (1 << 31) - 1  # in no vocabulary: in the place of -1, with which vLLM fills up


class Text:
    """The tokens of one request, and what its own past drafts."""

    def __init__(self) -> None:
        self.past = b""  # the tokens as vLLM has them, to be compared at the speed of memory
        self.size = 0  # in tokens
        self.new = 0  # tokens that the last call brought
        self.drafted = 0  # drafts that are being verified
        self._expected = self._accepted = 0.0  # drafts, by their probabilities, and really; old ones fade
        self._drafts = SuffixProposer()([])

    def follow(self, tokens: NDArray[np.int32], past: bytes) -> None:
        """Goes on to `tokens`, which begin with those that are known. past: their bytes."""
        new = tokens[self.size :]
        self._accepted = _KEPT * (self._accepted + min(self.drafted, max(len(new) - 1, 0)))
        self._expected *= _KEPT
        self._drafts.extend(np.where(new < 0, _NO_TOKEN, new).tolist())
        self.past, self.size, self.new = past, len(tokens), len(new)

    def draft(self, most: int, least: float, vocabulary: int) -> list[int]:
        """Up to `most` tokens that follow, each of them right, with all before it, at a probability over `least`."""
        worth = min(1.0, (self._accepted + _TRIES) / (self._expected + _TRIES))
        tokens, probabilities = map(np.asarray, self._drafts.propose(most))
        drafts: list[int] = []
        right = 1.0
        for token, probability in zip(tokens.tolist(), probabilities.tolist(), strict=True):
            right *= probability
            if right * worth <= least or token >= vocabulary:
                break
            drafts.append(token)
            self._expected += right
        self.drafted = len(drafts)
        return drafts


class Texts:
    """The texts of the last call's rows, and some that have no row at the moment."""

    def __init__(self) -> None:
        self._rows: dict[int, Text] = {}
        self._waiting: list[Text] = []  # the last one had a row last

    def follow(self, rows: Mapping[int, NDArray[np.int32]]) -> tuple[dict[int, Text], bool]:
        """rows: number of a row -> its tokens. Returns each one's text, and whether all had a row in the last call.

        A row keeps its text if its tokens begin with that. If not, it goes on with the longest text that they do begin
        with and that has no row any more, or with a new one.
        """
        pasts = {row: tokens.tobytes() for row, tokens in rows.items()}
        texts = {row: self._rows[row] for row in rows.keys() & self._rows.keys()}
        texts = {row: text for row, text in texts.items() if pasts[row].startswith(text.past)}
        if len(texts) < len(rows) or len(texts) < len(self._rows):
            kept = set(texts.values())
            left = [*self._waiting, *(text for text in self._rows.values() if text not in kept)]
            for row in [row for row in rows if row not in texts]:
                fitting = [text for text in left if pasts[row].startswith(text.past)]
                texts[row] = max(fitting, key=lambda text: text.size, default=None) or Text()
                if fitting:
                    left.remove(texts[row])
            self._waiting = newest(left, _MAX_WAITING)
        steady = bool(texts) and set(texts.values()) <= set(self._rows.values())
        for row, text in texts.items():
            text.follow(rows[row], pasts[row])
        self._rows = texts
        return texts, steady


def newest(texts: list[Text], most: int) -> list[Text]:
    """The last of these, of at most so many tokens together."""
    left = most
    for number, text in enumerate(reversed(texts)):
        left -= text.size
        if left < 0:
            return texts[len(texts) - number :]
    return texts
