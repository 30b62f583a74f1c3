"""One decode of a model: its texts, each in a slot of its own, opened and closed while others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..drafting.drafter import Drafter
from ..target.attention import layer_windows
from ..target.cache import TreeCache
from ..target.model import TargetModel, lasting_capacity
from ..target.step_audit import MAX_PADDING
from .fused.step import records_fused, versions
from .fused.trace import NotFused
from .past import Past, take_past
from .recorder import Unrecordable, expected_on
from .recordings import Recordings
from .replayable import hooks_of, obstacle
from .runtime import Runtime
from .sampling import Chooser
from .stats import DecodeStats
from .stepper import Drafts, Stepper


class Running(NamedTuple):
    """How steps run, as in `decode`: graphs, fuse, pack. slots: texts that are decoded at once, at most."""

    graphs: bool | None = None
    fuse: bool | None = None
    pack: bool | None = None
    slots: int = 1


ALONE = Running()


class Session:
    """Made by `session`, which keeps other decodes of the model away while it is there.

    texts: the Steppers that are open, in the order in which they were opened.
    """

    def __init__(self, runtime: Runtime, drafts: Drafts, running: Running) -> None:
        self._runtime, self._drafts, self._running = runtime, drafts, running
        model = runtime.model
        # Before a hook of ours is there.
        self._in_the_way, self._hooks = obstacle(model, "a fused step"), hooks_of(model)
        with torch.inference_mode():  # what is kept is made and written in it, whatever the caller's mode is
            self._way = runtime.capability().way
            runtime.weights = versions(chain(model.parameters(), model.buffers()))
            self._drafter = runtime.bind(drafts)
        self._target: TargetModel | None = None  # the first text's
        self.texts: list[Stepper] = []
        self._pasts: dict[Stepper, Past] = {}  # of the texts that are kept

    def open(self, chooser: Chooser, stats: DecodeStats, capacity: int, prompt: Tensor | None = None) -> Stepper:
        """A text's steps, with the model prepared for them until `close`. `Stepper.prefill` comes next.

        capacity: tokens that the cache has to hold. prompt: the text's, if it is to go on from one before and to be
        kept for later ones; None: it is not. Raises ValueError where graphs or fuse is True and cannot be had.
        """
        with torch.inference_mode():
            recordings, drafter = self._recordings(chooser, stats, capacity)
            past = None if recordings else self._past(prompt, capacity)
            if past is None:  # it would be in the way of this text's memory
                self._runtime.pasts.clear()
            cache = recordings.memory.cache if recordings else None if past is None else past.cache
            if self._target is None:
                model, context = self._runtime.model, drafter.has_context
                target = self._target = TargetModel(model, self._way, capacity, cache=cache, context=context)
            else:
                target = self._target.beside(capacity, cache)
        give_up, begin = self._giving_up(stats), self._beginning(stats, drafter, recordings, past)
        stepper = Stepper(target, self._drafts, drafter, chooser, stats, recordings, give_up, begin, self.texts)
        target.__enter__()
        self.texts.append(stepper)
        if past is not None:
            self._pasts[stepper] = past
        return stepper

    def close(self, text: Stepper) -> None:
        """The text has ended."""
        self.texts.remove(text)
        text.target.__exit__()
        past = self._pasts.pop(text, None)
        if past is not None:
            past.tokens = text.kept()
            self._runtime.pasts.append(past)

    def close_all(self) -> None:
        """Whatever has ended them."""
        for text in list(self.texts):
            self.close(text)
        del self._runtime.pasts[: -self._running.slots]

    def _recordings(self, chooser: Chooser, stats: DecodeStats, capacity: int) -> tuple[Recordings | None, Drafter]:
        if self._running.graphs is False:
            return None, self._drafter
        try:
            if self._running.slots > 1:
                raise Unrecordable("several texts are decoded at once")
            recordings = self._runtime.recorded(chooser, capacity, self._drafter.has_context)
            return recordings, recordings.keep(self._drafts.heads, self._drafter)
        except Unrecordable as error:
            self._fall_back(stats, error)
            return None, self._drafter

    def _fall_back(self, stats: DecodeStats, error: Unrecordable) -> None:
        if self._running.graphs:
            raise ValueError(f"decode: graphs must be None or False here, got True: {error}") from error
        stats.fallback = str(error)
        if expected_on(self._runtime.model.device):
            self._runtime.warn_once(f"decode: no CUDA graphs, each op is launched by itself: {error}")

    def _giving_up(self, stats: DecodeStats) -> Callable[[Unrecordable], None]:
        def give_up(error: Unrecordable) -> None:
            self._runtime.give_up_recording(error)
            self._fall_back(stats, error)

        return give_up

    def _past(self, prompt: Tensor | None, capacity: int) -> Past | None:
        """What the text of the prompt goes on from, with room for it; None: nothing is kept."""
        model, drafter = self._runtime.model, self._drafter
        if prompt is None or model.device.type != "cpu":
            return None
        windows, autocast = layer_windows(model.config), torch.is_autocast_enabled("cpu")
        graphs, *switches, slots = self._running
        setting = (self._hooks, model.dtype, torch.get_num_threads(), windows, autocast, *switches)
        key = (*self._runtime.state, setting, drafter if drafter.has_context else None)
        room = lasting_capacity(model, capacity + MAX_PADDING)
        empty = TreeCache(len(windows), room, 1, model.device, drafter.has_context)
        return take_past(self._runtime.pasts, key, prompt, empty, slots - len(self.texts))

    def _beginning(
        self, stats: DecodeStats, bound: Drafter, recordings: Recordings | None, past: Past | None
    ) -> Callable[[TargetModel, Tensor], tuple[int, Drafter]]:
        def begin(target: TargetModel, ids: Tensor) -> tuple[int, Drafter]:
            trials, drafter = self._runtime.trials, bound
            try:
                if self._running.fuse is not False:
                    drafter = self._fuse(target, ids, bound, stats, recordings)
            except NotFused as error:
                if self._running.fuse:
                    raise ValueError(f"decode: fuse must be None or False here, got True: {error}") from error
                stats.not_fused_because = str(error)
            if past is None or not (target.goes_as_steps(ids) and stats.exact) or stats.no_drafts_because:
                self._forget(past)
                return 0, drafter
            known = len(past.tokens) if self._runtime.trials == trials else 0
            return max(0, known - drafter.has_context), drafter  # a pair needs the state before its token

        return begin

    def _fuse(
        self, target: TargetModel, ids: Tensor, drafter: Drafter, stats: DecodeStats, recordings: Recordings | None
    ) -> Drafter:
        """See `Runtime.put_fused`."""
        records = records_fused(target.model.device)
        if recordings is not None and not records:
            return drafter
        if self._in_the_way:
            raise NotFused(self._in_the_way)
        if records and self._running.slots > 1:
            raise NotFused("several texts are decoded at once, each in a forward of its own")
        return self._runtime.put_fused(target, ids, drafter, self._running.pack, stats, recordings)

    def _forget(self, past: Past | None) -> None:
        """It is not kept: what its cache holds depends on how the text was cut into forwards."""
        self._pasts = {text: kept for text, kept in self._pasts.items() if kept is not past}


@contextmanager
def session(runtime: Runtime, drafts: Drafts, running: Running) -> Iterator[Session]:
    """A decode: texts may be opened while inside, each with the model prepared for its steps."""
    with runtime.sole():
        found = Session(runtime, drafts, running)
        try:
            yield found
        finally:
            found.close_all()


@contextmanager
def steps(
    runtime: Runtime, drafts: Drafts, chooser: Chooser, stats: DecodeStats, capacity: int, running: Running = ALONE
) -> Iterator[Stepper]:
    """Steps of a decode of one text, see `Session.open`, of which nothing is kept."""
    with session(runtime, drafts, running) as found:
        yield found.open(chooser, stats, capacity)
