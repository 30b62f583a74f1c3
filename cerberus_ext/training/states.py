"""Where the hidden states of a chunk come from: the cache, or a forward, in this process or in another one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.heads import output_matrix
from .answers import Answers
from .hidden import hidden_states
from .hidden_cache import HiddenCache
from .positions import Piece, Positions, pieces, positions
from .processes import Processes


class StateSource:
    """Hidden states of `answers`, at the tokens of the prompts only with `prompts`.

    computed, seconds: rows that were computed so far, and how long it took.
    """

    def __init__(
        self, model: nn.Module, answers: Answers, cache: HiddenCache | None, processes: Processes, prompts: bool = False
    ) -> None:
        self.model, self.answers, self.cache, self.processes = model, answers, cache, processes
        self.prompts = prompts
        self.size = output_matrix(model).shape[1]
        self.chunks = pieces(answers.lines, 0, len(answers.lines), prompts)
        self.computed, self.seconds = 0, 0.0

    def together(self, parts: list[Piece]) -> Positions:
        """The positions of the pieces, in every process: each computes a share of the chunks for all. Collective."""
        return positions(self.answers.lines, parts, self.size, self.shared(parts), self.prompts)

    def alone(self, parts: list[Piece]) -> Positions:
        """The positions of the pieces, in the main process only."""
        with self.bar(parts) as bar:
            found = (self.kept(piece.chunk, self.find(piece.chunk, bar)) for piece in parts)
            return positions(self.answers.lines, parts, self.size, found, self.prompts)

    def missing(self, parts: list[Piece]) -> int:
        """Rows in those chunks of the pieces that are not in the cache."""
        return sum(self.chunks[piece.chunk].rows for piece in parts if not self.cached(piece.chunk))

    def shared(self, parts: list[Piece]) -> Iterator[Tensor]:
        count, index = self.processes.count, self.processes.index
        with self.bar(parts[index::count]) as bar:
            for start in range(0, len(parts), count):
                group = parts[start : start + count]
                mine = self.find(group[index].chunk, bar) if index < len(group) else None
                for source, piece in enumerate(group):
                    shape = (self.chunks[piece.chunk].rows, self.size)
                    states = mine if source == index else torch.empty(shape, dtype=torch.bfloat16)
                    assert states is not None  # this process has a chunk of its own in this group
                    self.processes.broadcast(states, source)
                    yield self.kept(piece.chunk, states)

    def find(self, number: int, bar: tqdm) -> Tensor:
        """From the cache, else computed."""
        states = self.cache.load(number) if self.cache else None
        if states is not None:
            return states
        chunk = self.chunks[number]
        started, rows = time.perf_counter(), []
        for line in hidden_states(self.model, self.answers.lines[chunk.first : chunk.end], self.prompts):
            rows.append(line)
            bar.update(len(line))
        self.computed += chunk.rows
        self.seconds += time.perf_counter() - started
        return torch.cat(rows)

    def kept(self, number: int, states: Tensor) -> Tensor:
        if self.cache and self.processes.main:
            self.cache.store(number, states)
        return states

    def cached(self, number: int) -> bool:
        return self.cache is not None and self.cache.file(number).exists()

    def bar(self, parts: list[Piece]) -> tqdm:
        """For the states that this process has to compute."""
        total = self.missing(parts)
        return tqdm(
            total=total, desc="hidden states", unit="tok", unit_scale=True, leave=False,
            disable=not (total and self.processes.main),
        )  # fmt: skip
