"""The recorded steps of a model: each is recorded once for each kind, then replayed with one launch.

They are kept from one decode to the next, with the memory that they read and write: a later decode of a similar length
records nothing. A replay repeats what the recording did, and runs no Python of the model: hooks and autocast would be
left out, so a model with hooks, or decoding under autocast, is not recorded.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ..drafting.drafter import NO_DRAFTER, Drafter, HeadsLike
from ..target.attention import layer_windows
from ..target.cache import TreeCache
from ..target.model import TargetModel, lasting_capacity
from ..target.step_row import StepForward
from .recorder import RECORDERS, Unrecordable
from .replayable import memory_of
from .static_result import StaticResult
from .static_step import StepKind, StepMemory, run_step
from .stats import DecodeStats

# Libraries choose algorithms and take workspaces when they first see a shape, which a recording must not contain.
_WARM_UPS = 2
_MAX_HEADS = 4  # of one model, kept with their recordings

Recorded = tuple[StaticResult, Callable[[], None]]


class Recordings:
    """Of one model, which it does not keep alive."""

    def __init__(self, model: PreTrainedModel, capacity: int, context: bool) -> None:
        """capacity: tokens. context: whether there is room for heads with a context layer."""
        capacity = lasting_capacity(model, capacity)
        self.recorder = RECORDERS[model.device.type](model.device)
        self.memory = StepMemory(TreeCache(len(layer_windows(model.config)), capacity, 1, model.device, context))
        self._read = memory_of(model)
        self._heads: list[tuple[weakref.ref[HeadsLike], Drafter]] = []
        self._steps: dict[StepKind, Recorded] = {}
        self._fused: StepForward | None = None

    def fits(self, model: PreTrainedModel, capacity: int, context: bool) -> bool:
        """Whether the recordings still do what the model does, for so many tokens."""
        cache = self.memory.cache
        return cache.capacity >= capacity and cache.context >= context and self._read == memory_of(model)

    def keep(self, heads: HeadsLike, new: Drafter) -> Drafter:
        """new: heads.bind(model) -> the drafter of earlier recordings, where it serves again; else the new one."""
        if not new.recordable:
            return new
        for kept, drafter in self._heads:
            if kept() is heads and drafter.renew(new):
                return drafter
        # Makes room: without those that are outdated or gone, and the oldest of too many.
        serving = [(kept, drafter) for kept, drafter in self._heads if kept() is not None and kept() is not heads]
        self._heads = [*serving[-(_MAX_HEADS - 1) :], (weakref.ref(heads), new)]
        drafters = [NO_DRAFTER, *(drafter for _, drafter in self._heads)]
        self._steps = {kind: step for kind, step in self._steps.items() if kind.drafter.bound in drafters}
        return new

    def use(self, fused: StepForward | None) -> None:
        """Forwards are this fused step's, whose memory recordings read and write; None: op by op."""
        if fused is not self._fused:
            self._steps = {}
        self._fused = fused

    def step(self, target: TargetModel, kind: StepKind, stats: DecodeStats) -> Recorded:
        """The recorded step, recorded now if it is not there. Raises Unrecordable; the state is then as it was."""
        self.use(target.fused)
        if kind not in self._steps:
            begin = time.perf_counter()
            try:
                self._steps[kind] = self._record(target, kind)
            finally:
                stats.capture_seconds += time.perf_counter() - begin
            stats.captures += 1
        return self._steps[kind]

    def _record(self, target: TargetModel, kind: StepKind) -> Recorded:
        result, changed = self.memory.result(kind), self.memory.changed_by(kind)
        saved = [tensor.clone() for tensor in changed]

        def run() -> None:
            run_step(target, kind, self.memory, result)

        try:
            for turn in range(_WARM_UPS):
                self.recorder.warm_up(run, last=turn == _WARM_UPS - 1)
                torch._foreach_copy_(changed, saved)
            return result, self.recorder.record(run)
        except Exception as error:
            raise Unrecordable(f"recording a step failed: {type(error).__name__}: {error}") from error
        finally:
            torch._foreach_copy_(changed, saved)
