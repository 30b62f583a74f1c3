"""Where the hidden states of a chunk come from: the cache, or a forward, in this process or in another one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.heads import output_matrix
from .hidden import hidden_states
from .hidden_cache import HiddenCache
from .positions import Corpus, Piece, Positions
from .processes import Processes


class StateSource:
    """Hidden states of a corpus. computed, seconds: rows that were computed so far, and how long it took."""

    def __init__(self, model: nn.Module, corpus: Corpus, cache: HiddenCache | None, processes: Processes) -> None:
        self.model, self.corpus, self.cache, self.processes = model, corpus, cache, processes
        self.size = output_matrix(model).shape[1]
        self.computed, self.seconds = 0, 0.0

    def together(self, parts: list[Piece]) -> Positions:
        """The positions of the pieces, in every process: each computes a share of the chunks for all. Collective."""
        return self.corpus.positions(parts, self.size, self._shared(parts))

    def alone(self, parts: list[Piece]) -> Positions:
        """The positions of the pieces, in the main process only."""
        with self._bar(parts) as bar:
            return self.corpus.positions(parts, self.size, (self._kept(p, self._find(p, bar)) for p in parts))

    def missing(self, parts: list[Piece]) -> int:
        """Rows in those chunks of the pieces that are not in the cache."""
        return sum(self.corpus.chunks[piece.chunk].rows for piece in parts if not self.cached(piece.chunk))

    def cached(self, number: int) -> bool:
        return self.cache is not None and self.cache.file(number).exists()

    def _shared(self, parts: list[Piece]) -> Iterator[Tensor]:
        count, index = self.processes.count, self.processes.index
        with self._bar(parts[index::count]) as bar:
            for start in range(0, len(parts), count):
                group = parts[start : start + count]
                mine = self._find(group[index], bar) if index < len(group) else torch.empty(0)
                for source, piece in enumerate(group):
                    shape = (self.corpus.chunks[piece.chunk].rows, self.size)
                    states = mine if source == index else torch.empty(shape, dtype=torch.bfloat16)
                    self.processes.broadcast(states, source)
                    yield self._kept(piece, states)

    def _find(self, piece: Piece, bar: tqdm) -> Tensor:
        """The states of its chunk, from the cache, else computed."""
        states = self.cache.load(piece.chunk) if self.cache else None
        if states is not None:
            return states
        chunk, started = self.corpus.chunks[piece.chunk], time.perf_counter()
        lines = self.corpus.lines[chunk.first : chunk.end]
        states = hidden_states(self.model, lines, self.corpus.prompts, bar.update)
        self.computed += chunk.rows
        self.seconds += time.perf_counter() - started
        return states

    def _kept(self, piece: Piece, states: Tensor) -> Tensor:
        if self.cache and self.processes.main:
            self.cache.store(piece.chunk, states)
        return states

    def _bar(self, parts: list[Piece]) -> tqdm:
        """For the states that this process has to compute."""
        total = self.missing(parts)
        return tqdm(
            total=total, desc="hidden states", unit="tok", unit_scale=True, leave=False,
            disable=not (total and self.processes.main),
        )  # fmt: skip
