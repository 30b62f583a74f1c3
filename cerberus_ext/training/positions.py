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

from .answers import Answer

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


def pieces(lines: list[Answer], first: int, end: int, prompts: bool = False) -> list[Piece]:
    """Lines first..end - 1, by chunk. prompts: whether the tokens of the prompts have rows."""
    result = []
    for chunk in range(first // CHUNK_LINES, -(-end // CHUNK_LINES)):
        begin = chunk * CHUNK_LINES
        start, stop = max(first, begin), min(end, begin + CHUNK_LINES)
        wanted = lines[start:stop]
        counts = (stored_rows(wanted, prompts), stored_rows(lines[begin:start], prompts))
        result.append(Piece(chunk, start, stop, answer_tokens(wanted), *counts))
    return result


def positions(
    lines: list[Answer], parts: list[Piece], size: int, states: Iterable[Tensor], prompts: bool = False
) -> Positions:
    """The positions of the pieces. states: of each piece's whole chunk, (rows, size) bfloat16, in the same order."""
    total = sum(piece.rows for piece in parts)
    hidden = torch.empty(total, size, dtype=torch.bfloat16)
    start = 0
    for piece, chunk in zip(parts, states, strict=True):
        hidden[start : start + piece.rows] = chunk[piece.skip : piece.skip + piece.rows]
        start += piece.rows
    numbers = [line for piece in parts for line in range(piece.first, piece.end)]
    wanted = [lines[line] for line in numbers]
    counts = torch.tensor([stored_rows([line], prompts) for line in wanted])
    begins = counts.cumsum(0) - counts
    of_line = torch.repeat_interleave(torch.arange(len(numbers)), counts)
    places = torch.arange(total) - begins[of_line]
    left = counts[of_line] - 1 - places
    in_answer = left < torch.tensor([len(line.answer) for line in wanted])[of_line]
    return Positions(
        hidden,
        token_ids([[*line.prompt, *line.answer] if prompts else line.answer for line in wanted]),
        torch.where(in_answer, left, 0),
        torch.tensor(numbers)[of_line],
        places,
        in_answer.nonzero()[:, 0],
    )


def answer_ids(lines: list[Answer]) -> Tensor:
    """The tokens of all answers, one after the other, (T,) int64."""
    return token_ids([line.answer for line in lines])


def token_ids(parts: Iterable[Sequence[int]]) -> Tensor:
    """All tokens, one after the other, (T,) int64."""
    return torch.from_numpy(numpy.concatenate([numpy.asarray(part, dtype=numpy.int64) for part in parts]))


def answer_tokens(lines: Iterable[Answer]) -> int:
    return sum(len(line.answer) for line in lines)


def stored_rows(lines: Iterable[Answer], prompts: bool) -> int:
    """Rows of hidden states; prompts: whether the tokens of the prompts have some."""
    return sum(map(len, lines)) if prompts else answer_tokens(lines)
