"""Positions of answers with the hidden states there, and how answers are cut into pieces of them.

Heads are trained at the answers' tokens. A context layer reads those before them, too, the prompt's included: for it,
a line has a row for every token, else for those of its answer.

The lines of the data are numbered from 0, in the order of its files. CHUNK_LINES of them are a chunk: what is computed
together, and what the cache keeps in one file. The last lines are held out, and have chunks of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from .answers import Answers

CHUNK_LINES = 256


@dataclass(frozen=True)
class Chunk:
    """Lines first..end - 1. tokens: in their answers. rows: of hidden states, in them."""

    number: int
    first: int
    end: int
    tokens: int
    rows: int


@dataclass
class Positions:
    """The rows of some lines, line after line.

    hidden (T, D) bfloat16, zeros where nothing came before; tokens (T,) int64: the token that each state produced;
    left (T,) int64: how many tokens of the same answer follow it; lines (T,) int64: the line it comes from;
    offsets (T,) int64: its number among the rows of the line; answers (A,) int64: the rows of the answers' tokens.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor
    lines: Tensor
    offsets: Tensor
    answers: Tensor


class Corpus:
    """The answers, the last `held` lines of which are held out, and which of their tokens have rows: those of the
    prompts only with `prompts`.

    training, held: chunks. rows: of every line.
    """

    def __init__(self, answers: Answers, held: int = 0, prompts: bool = False) -> None:
        self.answers, self.lines, self.prompts = answers, answers.lines, prompts
        self.rows = [len(line) if prompts else len(line.answer) for line in self.lines]
        self.chunk_lines, self.first_held = CHUNK_LINES, len(self.lines) - held
        self.training = self._chunks(0, 0, self.first_held)
        self.held = self._chunks(len(self.training), self.first_held, len(self.lines))

    def _chunks(self, number: int, first: int, end: int) -> list[Chunk]:
        chunks: list[Chunk] = []
        for start in range(first, end, self.chunk_lines):
            stop = min(end, start + self.chunk_lines)
            tokens = sum(len(line.answer) for line in self.lines[start:stop])
            chunks.append(Chunk(number + len(chunks), start, stop, tokens, sum(self.rows[start:stop])))
        return chunks

    def answer_ids(self, first: int, end: int) -> Tensor:
        """The tokens of the answers in lines first..end - 1, one after the other, (T,) int64."""
        return token_ids([line.answer for line in self.lines[first:end]])

    def positions(self, chunks: list[Chunk], states: Iterable[Tensor]) -> Positions:
        """Of the chunks, whose hidden states (rows, D) are in the same order. Only one of them need be in memory."""
        numbers = [line for chunk in chunks for line in range(chunk.first, chunk.end)]
        lines = [self.lines[line] for line in numbers]
        counts = torch.tensor([self.rows[line] for line in numbers])
        of_line = torch.repeat_interleave(torch.arange(len(numbers)), counts)
        offsets = torch.arange(len(of_line)) - (counts.cumsum(0) - counts)[of_line]
        left = counts[of_line] - 1 - offsets
        in_answer = left < torch.tensor([len(line.answer) for line in lines])[of_line]
        hidden, start = torch.empty(0), 0
        for part in states:
            if not start:
                hidden = part.new_empty(len(of_line), part.shape[1])
            hidden[start : start + len(part)] = part
            start += len(part)
        return Positions(
            hidden,
            token_ids([[*line.prompt, *line.answer] if self.prompts else line.answer for line in lines]),
            torch.where(in_answer, left, 0),
            torch.tensor(numbers)[of_line],
            offsets,
            in_answer.nonzero()[:, 0],
        )


def token_ids(parts: Iterable[Sequence[int]]) -> Tensor:
    """All tokens, one after the other, (T,) int64."""
    return torch.from_numpy(numpy.concatenate([numpy.asarray(part, dtype=numpy.int64) for part in parts]))
