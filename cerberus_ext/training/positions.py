"""Positions of answers with the hidden states there, and how answers are cut into pieces of them.

Heads are trained at the answers' tokens. A context layer reads those before them, too, the prompt's included: for it,
a line has a row for every token, else for those of its answer.

The lines of the data are numbered from 0, in the order of its files. CHUNK_LINES of them are a chunk: what is computed
together, and what the cache keeps in one file. A piece is those lines of a chunk that are wanted: the last lines of the
data are held out, and the chunk in which they begin has lines of both kinds.
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
class Piece:
    """Lines first..end - 1, all of one chunk.

    tokens: in their answers. rows: of hidden states, in them; skip: in the chunk's lines before.
    """

    chunk: int
    first: int
    end: int
    tokens: int
    rows: int
    skip: int


@dataclass
class Positions:
    """The rows of some lines, line after line.

    hidden (T, D) bfloat16, zeros where nothing came before; tokens (T,) int64: the token that each state produced;
    left (T,) int64: how many tokens of the same answer follow it; lines (T,) int64: the line it comes from; places (T,)
    int64: its place among the rows of the line; answers (A,) int64: the rows of the answers' tokens.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor
    lines: Tensor
    places: Tensor
    answers: Tensor


class Corpus:
    """The answers, and which of their tokens have rows: those of the prompts only with `prompts`.

    tokens, rows: of every line. chunks: pieces of all lines.
    """

    def __init__(self, answers: Answers, prompts: bool = False) -> None:
        self.answers, self.lines, self.prompts = answers, answers.lines, prompts
        self.tokens = [len(line.answer) for line in self.lines]
        self.rows = [len(line) for line in self.lines] if prompts else self.tokens
        self.chunk_lines = CHUNK_LINES
        self.chunks = self.pieces(0, len(self.lines))

    def pieces(self, first: int, end: int) -> list[Piece]:
        """Lines first..end - 1, by chunk."""
        found = []
        for begin in range(first - first % self.chunk_lines, end, self.chunk_lines):
            start, stop = max(first, begin), min(end, begin + self.chunk_lines)
            counts = sum(self.tokens[start:stop]), sum(self.rows[start:stop]), sum(self.rows[begin:start])
            found.append(Piece(begin // self.chunk_lines, start, stop, *counts))
        return found

    def answer_ids(self, first: int, end: int) -> Tensor:
        """The tokens of the answers in lines first..end - 1, one after the other, (T,) int64."""
        return token_ids([line.answer for line in self.lines[first:end]])

    def positions(self, parts: list[Piece], size: int, states: Iterable[Tensor]) -> Positions:
        """Of the pieces. states: of each piece's whole chunk, (rows, size) bfloat16, in the same order."""
        total = sum(piece.rows for piece in parts)
        hidden = torch.empty(total, size, dtype=torch.bfloat16)
        start = 0
        for piece, chunk in zip(parts, states, strict=True):
            hidden[start : start + piece.rows] = chunk[piece.skip : piece.skip + piece.rows]
            start += piece.rows
        numbers = [line for piece in parts for line in range(piece.first, piece.end)]
        wanted = [self.lines[line] for line in numbers]
        counts = torch.tensor([self.rows[line] for line in numbers])
        of_line = torch.repeat_interleave(torch.arange(len(numbers)), counts)
        places = torch.arange(total) - (counts.cumsum(0) - counts)[of_line]
        left = counts[of_line] - 1 - places
        in_answer = left < torch.tensor([self.tokens[line] for line in numbers])[of_line]
        return Positions(
            hidden,
            token_ids([[*line.prompt, *line.answer] if self.prompts else line.answer for line in wanted]),
            torch.where(in_answer, left, 0),
            torch.tensor(numbers)[of_line],
            places,
            in_answer.nonzero()[:, 0],
        )


def token_ids(parts: Iterable[Sequence[int]]) -> Tensor:
    """All tokens, one after the other, (T,) int64."""
    return torch.from_numpy(numpy.concatenate([numpy.asarray(part, dtype=numpy.int64) for part in parts]))
