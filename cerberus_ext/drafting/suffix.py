"""Drafts from the text itself: what followed, the last time, what the text now ends with.

How far such a draft can be trusted depends on how long the match is, and on the text: a list repeats itself, a story
does not. So every text keeps its own record of matches that were right, and begins with what other texts have shown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _host
from ..io.checks import check_integer

# Probability that the token after a match of 0, 1, 2 ... tokens is the drafted one, in 1898 answers (382,584 tokens; a
# quarter greedy, a quarter at temperature 0.3, the others at 0.7) of SmolLM2-135M-Instruct to questions of
# many kinds, made of templates.
_USUAL = np.array(
    [0.0, 0.20, 0.50, 0.57, 0.67, 0.72, 0.75, 0.78, 0.79, 0.83, 0.84, 0.84, 0.87]
    + [0.89] * 3 + [0.91] * 2 + [0.92] * 2 + [0.93] * 4 + [0.98]
)  # fmt: skip
_WEIGHT = 10  # tries of a text that count as much as what is usual
_MOST = 0.995  # no draft is certain
_LONGEST_MATCH, _MOST_TOKENS = 1024, 1 << 30  # csrc/search/suffix_index.h
_USUAL_BY_MATCH = np.pad(_USUAL, (0, _LONGEST_MATCH + 1 - len(_USUAL)), "edge")


def probabilities_by_match(
    record: NDArray[np.int64], usual: NDArray[np.float64] = _USUAL_BY_MATCH
) -> NDArray[np.float64]:
    """record (M + 1, 2): tries and hits by length of the match, of one text; usual (M + 1 or more,): of others ->
    (M + 1,) probabilities."""
    tries, hits = record[:, 0], record[:, 1]
    return np.minimum((hits + _WEIGHT * usual[: len(record)]) / (tries + _WEIGHT), _MOST)


@dataclass(frozen=True)
class SuffixProposer:
    """For `decode(proposers=...)`: the longest match of the text's end with its own past, and what followed it.

    max_match: tokens that a match is followed back, 1..1024. max_tokens: of a text that are remembered, about, from 2.
    """

    max_match: int = 24
    max_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        check_integer("SuffixProposer: max_match", self.max_match, 1, _LONGEST_MATCH)
        check_integer("SuffixProposer: max_tokens", self.max_tokens, 2, _MOST_TOKENS)

    def __call__(self, prompt: list[int]) -> SuffixDrafts:
        index = _host.SuffixIndex(self.max_match, self.max_tokens)
        index.extend(prompt)
        return SuffixDrafts(index)


class SuffixDrafts:
    """A `Proposer`: the continuation of one text by its own index."""

    def __init__(self, index: _host.SuffixIndex) -> None:
        self._index = index

    def extend(self, tokens: list[int]) -> None:
        self._index.extend(tokens)

    def propose(self, max_depth: int) -> tuple[ArrayLike, ArrayLike]:
        tokens, matches = self._index.propose(max_depth)
        return tokens, probabilities_by_match(self._index.record())[matches]


class DocumentProposer:
    """For `decode(proposers=...)`: as SuffixProposer, but matches are looked for in documents that were read before.

    documents: token ids of each, as the model's tokenizer gives them. They are indexed here, once; texts share the
    index. max_match: tokens that a match is followed back, 1..1024. Raises TypeError where an argument is something
    else, and ValueError for what are no token ids.
    """

    def __init__(self, documents: Iterable[Sequence[int]], max_match: int = 24) -> None:
        if isinstance(documents, str | bytes) or not isinstance(documents, Iterable):
            raise TypeError(f"DocumentProposer: documents must be a sequence of token ids' lists, got {documents!r}")
        check_integer("DocumentProposer: max_match", max_match, 1, _LONGEST_MATCH)
        documents = list(documents)
        tokens = sum(len(document) for document in documents if isinstance(document, Sized))
        self._index = _host.SuffixIndex(max_match, max(2, 2 * tokens))  # nothing is forgotten
        for number, document in enumerate(documents):
            try:
                self._index.extend(document)
            except ValueError as error:
                raise ValueError(f"DocumentProposer: documents[{number}] must be token ids: {error}") from error
            self._index.end_document()
        self._usual = probabilities_by_match(self._index.record())  # of these documents, each after those before it

    def __call__(self, prompt: list[int]) -> DocumentDrafts:
        return DocumentDrafts(self._index, self._usual, prompt)


class DocumentDrafts:
    """A `Proposer`: the continuation of a text's end by an index of other texts, which stays as it is."""

    def __init__(self, index: _host.SuffixIndex, usual: NDArray[np.float64], prompt: list[int]) -> None:
        self._index = index
        self._usual = usual
        self._tail = list(prompt[-index.max_match :])
        self._record = np.zeros((index.max_match + 1, 2), dtype=np.int64)

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            drafted, matches = self._index.propose_after(self._tail, 1)
            self._record[matches[0] if len(matches) else 0] += (1, int(len(drafted) > 0 and drafted[0] == token))
            self._tail = [*self._tail, token][-self._index.max_match :]

    def propose(self, max_depth: int) -> tuple[ArrayLike, ArrayLike]:
        tokens, matches = self._index.propose_after(self._tail, max_depth)
        return tokens, probabilities_by_match(self._record, self._usual)[matches]
