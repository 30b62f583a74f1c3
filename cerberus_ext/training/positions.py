"""Positions of answers with the hidden states there, and how answers are cut into pieces of them.

The lines of the data are numbered from 0, in the order of its files. CHUNK_LINES of them are a chunk: what is computed
together, and what the cache keeps in one file. A piece is those lines of a chunk that are wanted: the last lines of the
data are held out, and the chunk in which they begin has lines of both kinds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from .answers import Answer

CHUNK_LINES = 256


@dataclass(frozen=True)
class Piece:
    """Lines first..end - 1, all of one chunk. rows: answer tokens in them; skip: in the chunk's lines before."""

    chunk: int
    first: int
    end: int
    rows: int
    skip: int


@dataclass
class Positions:
    """Answer tokens, line after line.

    hidden (T, D) bfloat16; tokens (T,) int64: the token that each state produced; left (T,) int64: how many tokens of
    the same answer follow it; lines (T,) int64: the line it comes from.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor
    lines: Tensor


def pieces(lines: list[Answer], first: int, end: int) -> list[Piece]:
    """Lines first..end - 1, by chunk."""
    result = []
    for chunk in range(first // CHUNK_LINES, -(-end // CHUNK_LINES)):
        begin = chunk * CHUNK_LINES
        start, stop = max(first, begin), min(end, begin + CHUNK_LINES)
        rows, skip = answer_tokens(lines[start:stop]), answer_tokens(lines[begin:start])
        result.append(Piece(chunk, start, stop, rows, skip))
    return result


def positions(lines: list[Answer], parts: list[Piece], size: int, states: Iterable[Tensor]) -> Positions:
    """The positions of the pieces. states: of each piece's whole chunk, (rows, size) bfloat16, in the same order."""
    total = sum(piece.rows for piece in parts)
    hidden = torch.empty(total, size, dtype=torch.bfloat16)
    start = 0
    for piece, chunk in zip(parts, states, strict=True):
        hidden[start : start + piece.rows] = chunk[piece.skip : piece.skip + piece.rows]
        start += piece.rows
    numbers = [line for piece in parts for line in range(piece.first, piece.end)]
    counts = torch.tensor([len(lines[line].answer) for line in numbers])
    tokens = answer_ids([lines[line] for line in numbers])
    of_line = torch.repeat_interleave(torch.arange(len(numbers)), counts)
    left = torch.cumsum(counts, 0)[of_line] - 1 - torch.arange(total)
    return Positions(hidden, tokens, left, torch.tensor(numbers)[of_line])


def answer_ids(lines: list[Answer]) -> Tensor:
    """The tokens of all answers, one after the other, (T,) int64."""
    return torch.from_numpy(numpy.concatenate([numpy.asarray(line.answer, dtype=numpy.int64) for line in lines]))


def answer_tokens(lines: Iterable[Answer]) -> int:
    return sum(len(line.answer) for line in lines)
