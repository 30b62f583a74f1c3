"""The short stage: conditional drafts alone, for heads that stay as they are.

What such heads offer at a position never changes, so it is computed once, when a window comes into memory.
"""

from __future__ import annotations

import time
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..drafting.dynamic_policy import MAX_DRAFTS
from .answers import Answers
from .options import SEGMENT, TrainOptions
from .places import Places, conditional_loss, joined, row_bytes
from .positions import Chunk
from .processes import Processes
from .start import trained_heads
from .trainer import Trainer
from .windows import Drawn, Loaded


class ConditionalTrainer(Trainer):
    """A run of `TrainOptions.only`."""

    def __init__(
        self, model: nn.Module, answers: Answers, options: TrainOptions, processes: Processes, made: dict[str, Any]
    ) -> None:
        super().__init__(model, answers, options, processes, made)
        assert options.init is not None
        self.stored_dtype = trained_heads(options.init, self.heads.config).weight.dtype  # the heads keep their bits
        self.offered = Loaded(self.windows, self._load_places)

    def row_bytes(self, size: int) -> int:
        return row_bytes(self.options.heads, MAX_DRAFTS)

    @cached_property
    def held_places(self) -> Places:
        started = time.perf_counter()
        places = self.places(self.held)
        self.held_seconds = time.perf_counter() - started
        return places

    def gradient(self, drawn: Drawn) -> Tensor:
        places, index, count = self.offered.of(drawn), self.processes.index, self.processes.count
        starts = drawn.starts[:, None] + torch.arange(SEGMENT)
        counts = places.usable[starts.flatten()].sum(0)
        return self.learn(places.rows(starts[index::count].flatten()), counts)

    def learn(self, places: Places, counts: Tensor) -> Tensor:
        """Sets the gradient, and returns the loss (), of places, a share of a step's. counts: of all of these."""
        places = Places(*(part.to(self.device) for part in places))
        self.optimizer.zero_grad()
        loss = conditional_loss(self.weighed(places)[0], places, counts.to(self.device))
        loss.backward()
        return loss.detach()

    def probe(self) -> None:
        rows = self.options.batch // self.processes.count
        places = self.held_places.rows(torch.arange(rows) % len(self.held_places.usable))
        self.learn(places, places.usable.sum(0))

    def more_seconds(self) -> float | None:
        """For what the heads offer, as long as it took for the held-out answers."""
        loads = self.windows.loads(self.step, self.options.steps)
        tokens = sum(chunk.tokens for window in loads for chunk in window)
        return tokens / len(self.held_places.usable) * self.held_seconds

    def step_memory(self) -> dict[str, int]:
        rows = self.options.batch // self.processes.count * (self.options.heads - 1) * (self.drafts + 1)
        return {"drafts of a step": 2 * 4 * rows * (self.options.conditional_rank or 0)}

    def loop(self) -> None:
        if self.processes.main and not self.curve:
            self.measure(None)  # of the heads as they are: what is kept is never worse
        super().loop()

    def evaluate(self) -> dict[str, Any]:
        return self.conditional_quality(self.held_places)

    def keep(self) -> None:
        self.save_heads()

    def _load_places(self, window: list[Chunk]) -> Places:
        """A few chunks at a time, one for each process to compute: only their hidden states are in memory."""
        count = self.processes.count
        groups = [window[first : first + count] for first in range(0, len(window), count)]
        return joined([self.places(self.source.together(group)) for group in groups])
