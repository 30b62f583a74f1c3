"""Draft proposers that know, draft or contradict what comes next; all check that they are told how the text goes on."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from cerberus_ext.drafting.proposers import ProposerFactory
from cerberus_ext.drafting.suffix import DocumentProposer, SuffixProposer

Answer = Callable[[list[int], int], tuple[Any, Any]]  # (what follows in the text, most) -> tokens, probabilities


class KnowingProposer:
    """Answers with what `answer` makes of what really follows."""

    def __init__(self, text: list[int], prompt: list[int], answer: Answer) -> None:
        assert prompt == text[: len(prompt)] and prompt
        self.text, self.answer, self.known = text, answer, len(prompt)
        self.asked: list[int] = []  # the most that each draft was to have

    def extend(self, tokens: list[int]) -> None:
        assert tokens and tokens == self.text[self.known : self.known + len(tokens)]
        self.known += len(tokens)

    def propose(self, most: int) -> tuple[Any, Any]:
        assert most >= 1
        self.asked.append(most)
        return self.answer(self.text[self.known :], most)


class KnowingMaker:
    """text: the ids (1, S) that `decode` is expected to return. made: the proposers."""

    def __init__(self, text: Tensor, answer: Answer) -> None:
        self.text, self.answer = text[0].tolist(), answer
        self.made: list[KnowingProposer] = []

    def __call__(self, prompt: list[int]) -> KnowingProposer:
        self.made.append(KnowingProposer(self.text, prompt, self.answer))
        return self.made[-1]


def right(probability: float = 0.9) -> Answer:
    """What follows, as far as the text is known."""
    return lambda follows, most: (follows[:most], [probability] * len(follows[:most]))


def wrong(vocab: int, probability: float = 1.0) -> Answer:
    """As many tokens as it may, none of which is right."""

    def answer(follows: list[int], most: int) -> tuple[list[int], list[float]]:
        tokens = [(token + 1) % vocab for token in (follows + [0] * most)[:most]]
        return tokens, [probability] * most

    return answer


def anything(vocab: int) -> Answer:
    """Random tokens, of which it is certain; sometimes none, sometimes more than it may."""
    numbers = random.Random(0)

    def answer(follows: list[int], most: int) -> tuple[list[int], list[float]]:
        count = numbers.randrange(most + 3)
        return [numbers.randrange(vocab) for _ in range(count)], [1.0] * count

    return answer


def table(vocab: int, places: int, drafts: int, rank: int) -> Answer:
    """(places, drafts), of which those of `rank` are right; one that is not there: none is."""

    def answer(follows: list[int], most: int) -> tuple[np.ndarray, np.ndarray]:
        first = np.array((follows + [0] * places)[:places]) - rank
        tokens = (first[:, None] + np.arange(drafts)) % vocab
        return tokens, np.broadcast_to(0.5 ** np.arange(1, 1 + drafts), tokens.shape)

    return answer


def nothing(follows: list[int], most: int) -> tuple[list[int], list[float]]:
    return [], []


def proposers_of(kind: str, text: Tensor, vocab: int) -> list[ProposerFactory]:
    """text: what `decode` is expected to return."""

    def knowing(answer: Answer) -> KnowingMaker:
        return KnowingMaker(text, answer)

    kinds: dict[str, Callable[[], list[ProposerFactory]]] = {
        "none": list,
        "suffix": lambda: [SuffixProposer(max_match=4)],
        "documents": lambda: [DocumentProposer([[1, 2, 3], text[0, 3:].tolist(), []])],
        "right": lambda: [knowing(right())],
        "wrong": lambda: [knowing(wrong(vocab))],
        "anything": lambda: [knowing(anything(vocab))],
        "table": lambda: [knowing(table(vocab, 6, 3, 1))],
        "tables": lambda: [knowing(table(vocab, 2, 4, 3)), knowing(table(vocab, 7, 1, -1))],
        "nothing": lambda: [knowing(nothing)],
        "several": lambda: [
            SuffixProposer(),
            knowing(anything(vocab)),
            knowing(table(vocab, 3, 2, 0)),
            knowing(nothing),
            knowing(right(0.3)),
        ],
    }
    return kinds[kind]()


KINDS = ["none", "suffix", "documents", "right", "wrong", "anything", "table", "tables", "nothing", "several"]
