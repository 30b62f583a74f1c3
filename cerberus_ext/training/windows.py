"""Which positions each training step draws, when only a window of the data fits into memory.

An epoch visits every chunk once: in the order of the file where all of them fit, else in an order of its own,
cut into windows that do. Within a window segments of SEGMENT consecutive positions are drawn in random order, from an
offset that is random, too. All of it follows from the seed, the epoch and the window's number, so that a resumed run
draws what an uninterrupted one would have, and so does every process of several.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Generic, NamedTuple, TypeVar

import numpy
import torch
from torch import Tensor

from .options import SEGMENT
from .positions import Chunk

T = TypeVar("T")


class Drawn(NamedTuple):
    """What a step reads: window `number` of an epoch, in it the segments with the first answer tokens `starts`."""

    epoch: int
    number: int
    window: list[Chunk]
    starts: Tensor  # (per_step,)


class Windows:
    """The plan of all steps.

    chunks: those to train on. memory: bytes that a window may have, row_bytes of them for each row.
    per_step: segments of a step.
    Raises ValueError where a chunk alone is too large, or where there are not enough positions for a step.
    """

    def __init__(self, chunks: list[Chunk], memory: float, row_bytes: int, per_step: int, seed: int) -> None:
        rows, tokens = [chunk.rows for chunk in chunks], sum(chunk.tokens for chunk in chunks)
        needed = (per_step + 2) * SEGMENT
        if tokens < needed:
            raise ValueError(
                f"train: data must have at least {needed} answer tokens before the held-out lines, got {tokens}"
            )
        self.chunks, self.per_step, self.seed = chunks, per_step, seed
        self.row_bytes, self.capacity = row_bytes, int(memory) // row_bytes
        self.whole = sum(rows) <= self.capacity
        minimum = max(*rows, needed) * row_bytes
        if not self.whole and memory < minimum:
            raise ValueError(f"train: memory must be at least {minimum / 1e9:.3g} GB, got {memory / 1e9:.3g}")

    def epoch(self, number: int) -> list[list[Chunk]]:
        """The windows of an epoch: all chunks, or in random order as many as fit into each."""
        if self.whole:
            return [self.chunks]
        windows, room = [list[Chunk]()], self.capacity
        for index in numpy.random.default_rng([self.seed, 2, number]).permutation(len(self.chunks)):
            room -= self.chunks[index].rows
            if room < 0:
                windows.append([])
                room = self.capacity - self.chunks[index].rows
            windows[-1].append(self.chunks[index])
        return windows

    def steps(self, window: list[Chunk]) -> int:
        """How many steps a window is good for; what does not fill the last one is left out."""
        return segments(window) // self.per_step

    def drawn(self, first: int) -> Iterator[Drawn]:
        """What the steps from `first` on read, without end."""
        for epoch in count():
            windows = self.epoch(epoch)
            if not any(map(self.steps, windows)):  # full of prompts
                raise ValueError("train: memory must be larger, no part of the data that fits is enough for a step")
            for number, window in enumerate(windows):
                if first < self.steps(window):
                    draw = numpy.random.default_rng([self.seed, 1, epoch, number])
                    offset = int(draw.integers(SEGMENT))
                    order = torch.from_numpy(draw.permutation(segments(window))) * SEGMENT + offset
                    for index in range(first, self.steps(window)):
                        yield Drawn(epoch, number, window, order[index * self.per_step :][: self.per_step])
                first = max(0, first - self.steps(window))

    def loads(self, first: int, end: int) -> list[list[Chunk]]:
        """The windows that the steps first..end - 1 bring into memory, one after the other."""
        drawn = islice(self.drawn(first), end - first)
        return list({(0 if self.whole else step.epoch, step.number): step.window for step in drawn}.values())


def segments(window: list[Chunk]) -> int:
    """Segments of a window: one less than fit, which leaves room for the offset."""
    return max(0, sum(chunk.tokens for chunk in window) // SEGMENT - 1)


class Loaded(Generic[T]):
    """What `load` makes of the window that steps draw from; the one before is freed first."""

    def __init__(self, windows: Windows, load: Callable[[list[Chunk]], T]) -> None:
        self.windows, self.load = windows, load
        self.kept: tuple[tuple[int, int], T] | None = None

    def of(self, drawn: Drawn) -> T:
        key = (0 if self.windows.whole else drawn.epoch, drawn.number)
        if self.kept is None or self.kept[0] != key:
            self.kept = None
            self.kept = (key, self.load(drawn.window))
        return self.kept[1]
