"""Stand-ins for what vLLM gives a proposer: its configuration, and its batch, whose rows move and are used again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

VOCABULARY = 100


def vllm_config(drafts: int = 8, max_tokens: int = 4096) -> Any:
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts),
        model_config=SimpleNamespace(max_model_len=max_tokens, get_vocab_size=lambda: VOCABULARY),
    )


class Batch:
    """Requests by name in rows. What was in a row before stays behind a shorter text, as in vLLM."""

    def __init__(self, rows: int = 8, width: int = 4096) -> None:
        self.token_ids = np.full((rows, width), 7, np.int32)
        self.counts = np.zeros(rows, np.int32)
        self.names: list[str] = []

    def add(self, name: str, tokens: list[int]) -> None:
        self.names.append(name)
        self.write(len(self.names) - 1, tokens)

    def write(self, row: int, tokens: list[int]) -> None:
        self.token_ids[row, : len(tokens)] = tokens
        self.counts[row] = len(tokens)

    def text(self, name: str) -> list[int]:
        row = self.names.index(name)
        return self.token_ids[row, : self.counts[row]].tolist()

    def remove(self, name: str) -> list[int]:
        """The last row moves to its place. Returns its text."""
        text, row, last = self.text(name), self.names.index(name), self.names[-1]
        self.write(row, self.text(last))
        self.names[row] = last
        self.names.pop()
        return text

    def swap(self, one: str, other: str) -> None:
        first, second = self.names.index(one), self.names.index(other)
        texts = self.text(one), self.text(other)
        self.names[first], self.names[second] = other, one
        self.write(second, texts[0])
        self.write(first, texts[1])

    def step(self, proposer: Any, sampled: dict[str, list[int]]) -> dict[str, list[int]]:
        """A step that has added these tokens; who is not named has read a part of its prompt. Returns the drafts."""
        for name, tokens in sampled.items():
            self.write(self.names.index(name), self.text(name) + tokens)
        drafts = proposer.propose([sampled.get(name, []) for name in self.names], self.counts, self.token_ids)
        return dict(zip(self.names, drafts, strict=True))
