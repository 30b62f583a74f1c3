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
from .positions import Chunk, Corpus, Positions
from .processes import Processes


class StateSource:
    """Hidden states of a corpus. computed, seconds: rows that were computed so far, and how long it took."""

    def __init__(self, model: nn.Module, corpus: Corpus, cache: HiddenCache | None, processes: Processes) -> None:
        self.model, self.corpus, self.cache, self.processes = model, corpus, cache, processes
        self.size = output_matrix(model).shape[1]
        self.computed, self.seconds = 0, 0.0

    def together(self, chunks: list[Chunk]) -> Positions:
        """Their positions, in every process: each computes a share of the chunks for all. Collective."""
        return self.corpus.positions(chunks, self._shared(chunks))

    def missing(self, chunks: list[Chunk]) -> int:
        """Rows in those of the chunks that are not in the cache."""
        return sum(chunk.rows for chunk in chunks if self.cache is None or not self.cache.file(chunk).exists())

    def _shared(self, chunks: list[Chunk]) -> Iterator[Tensor]:
        count, index = self.processes.count, self.processes.index
        with self._bar(chunks[index::count]) as bar:
            for start in range(0, len(chunks), count):
                group = chunks[start : start + count]
                mine = self._find(group[index], bar) if index < len(group) else torch.empty(0)
                for source, chunk in enumerate(group):
                    states = mine if source == index else torch.empty(chunk.rows, self.size, dtype=torch.bfloat16)
                    self.processes.broadcast(states, source)
                    yield self._kept(chunk, states)

    def _find(self, chunk: Chunk, bar: tqdm) -> Tensor:
        """The chunk's states, from the cache, else computed."""
        states = self.cache.load(chunk) if self.cache else None
        if states is None:
            started, lines = time.perf_counter(), self.corpus.lines[chunk.first : chunk.end]
            states = hidden_states(self.model, lines, self.corpus.prompts, bar.update)
            self.computed += chunk.rows
            self.seconds += time.perf_counter() - started
        return states

    def _kept(self, chunk: Chunk, states: Tensor) -> Tensor:
        if self.cache and self.processes.main:
            self.cache.store(chunk, states)
        return states

    def _bar(self, chunks: list[Chunk]) -> tqdm:
        """For the states that this process has to compute."""
        total = self.missing(chunks)
        return tqdm(
            total=total, desc="hidden states", unit="tok", unit_scale=True, leave=False,
            disable=not (total and self.processes.main),
        )  # fmt: skip
