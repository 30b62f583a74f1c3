"""Which positions each training step draws, when only a window of the data fits into memory.

An epoch visits every training piece once: in the order of the file where all of them fit, else in an order of its own,
cut into windows that do. Within a window segments of SEGMENT consecutive positions are drawn in random order, from an
offset that is random, too. All of it follows from the seed, the epoch and the window's number, so that a resumed run
draws what an uninterrupted one would have, and so does every process of several.
"""

from __future__ import annotations

from functools import lru_cache

import numpy
import torch
from torch import Tensor

from .options import SEGMENT
from .positions import Piece


class Windows:
    """The plan of all steps.

    parts: the training pieces. memory: bytes that a window may have, row_bytes of them for each row.
    per_step: segments of a step.
    Raises ValueError where a piece alone is too large, or where there are not enough positions for a step.
    """

    def __init__(self, parts: list[Piece], memory: float, row_bytes: int, per_step: int, seed: int) -> None:
        rows, tokens = [piece.rows for piece in parts], sum(piece.tokens for piece in parts)
        needed = (per_step + 2) * SEGMENT
        if tokens < needed:
            raise ValueError(
                f"train: data must have at least {needed} answer tokens before the held-out lines, got {tokens}"
            )
        self.parts, self.per_step, self.seed = parts, per_step, seed
        self.row_bytes, self.capacity = row_bytes, int(memory) // row_bytes
        self.whole = sum(rows) <= self.capacity
        least = max(max(rows), needed)
        if not self.whole and self.capacity < least:
            raise ValueError(f"train: memory must be at least {least * row_bytes / 1e9:.3g} GB, got {memory / 1e9:.3g}")
        self._epoch, self._first = 0, 0  # an epoch and its first step: where `locate` goes on

    def epoch(self, number: int) -> list[list[Piece]]:
        """The windows of an epoch: lists of pieces."""
        if self.whole:
            return [self.parts]
        return _cut(tuple(self.parts), self.capacity, self.seed, number)

    def steps(self, window: list[Piece]) -> int:
        """How many steps a window is good for; what does not fill the last one is left out."""
        return segments(window) // self.per_step

    def locate(self, step: int) -> tuple[int, int, int]:
        """Epoch, window and step within the window."""
        if step < self._first:
            self._epoch = self._first = 0
        while True:
            left = step - self._first
            windows = self.epoch(self._epoch)
            if not any(map(self.steps, windows)):  # full of prompts
                raise ValueError("train: memory must be larger, no part of the data that fits is enough for a step")
            for number, window in enumerate(windows):
                if left < self.steps(window):
                    return self._epoch, number, left
                left -= self.steps(window)
            self._first = step - left
            self._epoch += 1

    def starts(self, epoch: int, number: int, index: int) -> Tensor:
        """First answer tokens, within the window, of the segments of its step `index`, (per_step,)."""
        order = _order(segments(self.epoch(epoch)[number]), self.seed, epoch, number)
        return order[index * self.per_step : (index + 1) * self.per_step]


def segments(window: list[Piece]) -> int:
    """Segments of a window: one less than fit, which leaves room for the offset."""
    return max(0, sum(piece.tokens for piece in window) // SEGMENT - 1)


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int, number: int) -> Tensor:
    draw = numpy.random.default_rng([seed, 1, epoch, number])
    offset = int(draw.integers(SEGMENT))
    return torch.from_numpy(draw.permutation(count)) * SEGMENT + offset


@lru_cache(maxsize=2)
def _cut(parts: tuple[Piece, ...], capacity: int, seed: int, epoch: int) -> list[list[Piece]]:
    """The pieces in random order, as many as fit into each window."""
    windows: list[list[Piece]] = [[]]
    rows = 0
    for index in numpy.random.default_rng([seed, 2, epoch]).permutation(len(parts)):
        if rows + parts[index].rows > capacity:
            windows.append([])
            rows = 0
        windows[-1].append(parts[index])
        rows += parts[index].rows
    return windows
