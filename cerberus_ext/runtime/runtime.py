"""What a model's steps need from one decode to the next, and who owns it: a Runtime, kept and freed with the model."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting.context_layer import BoundContext
from ..drafting.drafter import NO_DRAFTER, Drafter
from ..drafting.heads_drafter import HeadsDrafter
from ..target.attention import layer_windows
from ..target.cache import TreeCache
from ..target.model import TargetModel, lasting_capacity
from ..target.step_audit import MAX_PADDING
from .capability import Capability, examine
from .fused.context import FusedContext
from .fused.proof import check_fused
from .fused.step import FusedStep, records_fused, versions
from .fused.trace import NotFused
from .past import Past
from .recorder import RECORDERS, Unrecordable, expected_on
from .recordings import Recordings
from .replayable import hooks_of, memory_of, obstacle
from .sampling import Chooser
from .stats import DecodeStats
from .stepper import Drafts, Stepper

_ORDER_ON_A_GPU = "attention on a GPU is summed in an order that depends on the number of nodes"
_TRIED = 64  # tokens of a prompt that a new fused step is tried behind


class Runtime:
    """Of one model, which it does not keep alive.

    looked_up: what was found for heads (their calibrations), by heads.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._capability: tuple[Any, Capability] | None = None
        self._memory: Any = None  # memory_of the model when its capability was last asked for
        self._weights: Any = None  # versions of its tensors when the latest text began
        self._fused: tuple[Any, FusedStep] | None = None
        self._not_fused: tuple[Any, str] | None = None  # why there is none; it is not tried again
        self._fused_context: tuple[BoundContext, FusedContext | None] | None = None  # of the latest heads
        self._trials = 0  # which have written over a cache
        self._past: Past | None = None
        self._recordings: Recordings | None = None
        self._failure: tuple[Any, str] | None = None  # why a step could not be recorded; it is not tried again
        self._bound: tuple[weakref.ref[Any], Any, Drafter] | None = None  # the latest heads, bound to the model
        self._said: set[str] = set()
        self.looked_up: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    @property
    def model(self) -> PreTrainedModel:
        model = self._model()
        assert model is not None  # whoever asks has it
        return model

    def capability(self) -> Capability:
        """Told at the first call with these weights, modules, hooks and threads; later ones return it.

        Raises ValueError, naming the model's class and the reason, where the model's steps cannot run.
        """
        model = self.model
        self._memory = memory_of(model)
        key = (self._memory, hooks_of(model), torch.get_num_threads(), model.dtype)
        if self._capability is None or self._capability[0] != key:
            self._capability = (key, examine(model))
        return self._capability[1]

    def target(self, capacity: int, **options: Any) -> TargetModel:
        """The model for steps of one's own, as TargetModel. Not while another decode of it runs: see `sole`."""
        return TargetModel(self.model, self.capability().way, capacity, **options)

    @contextmanager
    def sole(self) -> Iterator[None]:
        """While inside, another decode of the model is refused: both would switch its attention and use its memory."""
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "decode: model must not be decoding already, another thread, or a gate, streamer or stopping criterion"
                " that was called from a decode, uses it at this moment: take turns, or decode with a copy of it"
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def steps(
        self, drafts: Drafts, chooser: Chooser, stats: DecodeStats, capacity: int,
        graphs: bool | None = None, fuse: bool | None = None, pack: bool | None = None, prompt: Tensor | None = None,
    ) -> Iterator[Stepper]:  # fmt: skip
        """Steps of one decode, with the model prepared for them while inside.

        capacity: tokens that the cache has to hold. graphs, fuse, pack: as in `decode`. Raises ValueError where one of
        them is True and cannot be had. prompt: the text's, if it is to go on from the one before and to be kept for the
        next; None: what is kept is freed.
        """

        def fall_back(error: Unrecordable) -> None:
            if graphs:
                raise ValueError(f"decode: graphs must be None or False here, got True: {error}") from error
            stats.fallback = str(error)
            if expected_on(self.model.device):
                self.warn_once(f"decode: no CUDA graphs, each op is launched by itself: {error}")

        def give_up(error: Unrecordable) -> None:
            self._recordings, self._failure = None, (memory_of(self.model), str(error))
            fall_back(error)

        in_the_way = obstacle(self.model, "a fused step")  # before a hook of ours is there

        past: Past | None = None

        def begin(target: TargetModel, ids: Tensor) -> int:
            nonlocal past
            trials = self._trials
            try:
                if fuse is not False:
                    self._put_fused(target, ids, drafter, pack, stats, at_end, in_the_way, recordings)
            except NotFused as error:
                if fuse:
                    raise ValueError(f"decode: fuse must be None or False here, got True: {error}") from error
                stats.not_fused_because = str(error)
            if past is None or not (target.goes_as_steps(ids) and stats.exact) or stats.no_drafts_because:
                past = None
                return 0
            known = len(past.tokens) if self._trials == trials else 0
            return max(0, known - drafter.has_context)  # a pair needs the state before its token

        with self.sole():
            past, self._past = self._past, None
            with torch.inference_mode():  # what is kept is made and written in it, whatever the caller's mode is
                way = self.capability().way
                self._weights = versions(chain(self.model.parameters(), self.model.buffers()))
                drafter = self._bind(drafts)
                recordings = None
                if graphs is not False:
                    try:
                        recordings = self._recorded(chooser, capacity, drafter.has_context)
                        drafter = recordings.keep(drafts.heads, drafter)
                    except Unrecordable as error:
                        fall_back(error)
                past = None if recordings else self._past_of(past, prompt, capacity, drafter, (fuse, pack))
                cache = recordings.memory.cache if recordings else None if past is None else past.cache
                target = TargetModel(self.model, way, capacity, cache=cache, context=drafter.has_context)
            with target, ExitStack() as at_end:
                stepper = Stepper(target, drafts, drafter, chooser, stats, recordings, give_up, begin)
                try:
                    yield stepper
                finally:
                    if past is not None:
                        past.tokens, self._past = stepper.kept(), past

    def _past_of(
        self, past: Past | None, prompt: Tensor | None, capacity: int, drafter: Drafter, switches: tuple[Any, ...]
    ) -> Past | None:
        """What the text of the prompt goes on from, with room for it; None: nothing is kept."""
        model = self.model
        if prompt is None or model.device.type != "cpu":
            return None
        windows, autocast = layer_windows(model.config), torch.is_autocast_enabled("cpu")
        setting = (hooks_of(model), model.dtype, torch.get_num_threads(), windows, autocast, *switches)
        key = (self._memory, self._weights, setting, drafter if drafter.has_context else None)
        room = lasting_capacity(model, capacity + MAX_PADDING)
        if past is None or past.key != key:
            past = Past(key, TreeCache(len(windows), room, 1, model.device, drafter.has_context))
        past.cut(prompt, room)
        return past

    def _bind(self, drafts: Drafts) -> Drafter:
        heads, model = drafts.heads, self.model
        tensors = [*heads.parameters(), *heads.buffers()] if isinstance(heads, torch.nn.Module) else []
        key = None if not tensors else (versions(tensors), versions(model.parameters()), model.dtype)
        if key is not None and self._bound is not None and self._bound[0]() is heads and self._bound[1] == key:
            drafter = self._bound[2]
        else:
            drafter = heads.bind(model)  # also where they are not asked: they have to fit
            self._bound = None if key is None else (weakref.ref(heads), key, drafter)
        if not isinstance(drafter, Drafter):
            raise TypeError(f"decode: heads.bind must return a Drafter, got {type(drafter).__name__}")
        return drafter if drafts.drafts else NO_DRAFTER

    def _put_fused(
        self, target: TargetModel, prompt: Tensor, drafter: Drafter, pack: bool | None, stats: DecodeStats,
        at_end: ExitStack, in_the_way: str | None, recordings: Recordings | None,
    ) -> None:  # fmt: skip
        """Raises NotFused where there is none."""
        if recordings is not None and not records_fused(target.model.device):
            return
        if in_the_way:
            raise NotFused(in_the_way)
        fused = self._fused_for(target, prompt, pack, stats, recordings)
        if isinstance(drafter, HeadsDrafter) and drafter.context is not None and not fused.recordable:
            drafter.context.fused = self._context_for(drafter.context, target, prompt)
            at_end.callback(setattr, drafter.context, "fused", None)
        target.fused = fused

    def _fused_for(
        self, target: TargetModel, prompt: Tensor, pack: bool | None, stats: DecodeStats, recordings: Recordings | None
    ) -> FusedStep:
        """What an earlier decode has made, or a new one, tried on the prompt's beginning. Raises NotFused."""
        model = self.model
        key = (self._memory, self._weights, model.dtype, pack, recordings is None)
        if self._fused is None or self._fused[0] != key:
            self._fused = None  # first, so that there is memory for the new one
            if recordings is not None:
                recordings.use(None)  # it reads the memory of theirs
            if self._not_fused is not None and self._not_fused[0] == key:
                raise NotFused(self._not_fused[1])
            try:
                with self._trial(target):
                    # A step behind them has to have a position, or a prompt that takes all would leave none fused.
                    target.prefill(prompt[:, : max(1, min(_TRIED, target.max_positions - 1))])
                    fused = FusedStep(target, pack)
                    check_fused(target, fused)
            except NotFused as error:
                self._not_fused = (key, str(error))
                raise
            self._fused = (key, fused)
            stats.fuse_seconds = fused.seconds
        stats.fused = True
        if stats.no_drafts_because is None:
            stats.inexact_because = _ORDER_ON_A_GPU if self._fused[1].recordable else None
            stats.exact = stats.inexact_because is None
        self._fused[1].prepare(target.cache)
        return self._fused[1]

    def _context_for(self, context: BoundContext, target: TargetModel, prompt: Tensor) -> FusedContext | None:
        """The same for a context layer; None: it runs op by op. Raises as `TargetModel.prefill_all`."""
        if self._fused_context is None or self._fused_context[0] is not context:
            with self._trial(target):
                target.prefill_all(prompt[:, :1])
            self._fused_context = (context, None)
            with suppress(NotFused):
                self._fused_context = (context, FusedContext(context, target.cache))
        if (fused := self._fused_context[1]) is not None:
            fused.begin()
        return fused

    @contextmanager
    def _trial(self, target: TargetModel) -> Iterator[None]:
        """What is put into the target's cache while inside is forgotten."""
        self._trials += 1
        try:
            yield
        finally:
            target.cache.reset()

    def _recorded(self, chooser: Chooser, capacity: int, context: bool) -> Recordings:
        """Those that are kept, or new ones. Raises Unrecordable."""
        if chooser.host_rules:
            rules = ", ".join(chooser.host_rules)
            raise Unrecordable(f"the logits are processed on the host ({rules})")
        model = self.model
        if model.device.type not in RECORDERS:
            raise Unrecordable(f"the model is on {model.device}, not on a CUDA device")
        if reason := obstacle(model, "a replay"):
            raise Unrecordable(reason)
        if self._failure is not None and self._failure[0] == memory_of(model):
            raise Unrecordable(self._failure[1])
        if self._recordings is None or not self._recordings.fits(model, capacity, context):
            self._recordings = self._failure = None  # first, so that there is memory for the new ones
            self._recordings = Recordings(model, capacity, context)
        return self._recordings

    def warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)

    def release(self) -> None:
        """Frees the caches, the static tensors, the recorded steps, the fused step; the next decode makes new ones.

        After this, a model of which a step could not be recorded or fused is tried again.
        """
        self._recordings = self._failure = self._fused = self._not_fused = self._bound = self._fused_context = None
        self._past = None


_runtimes: weakref.WeakKeyDictionary[PreTrainedModel, Runtime] = weakref.WeakKeyDictionary()
_runtimes_lock = threading.Lock()


def runtime_of(model: PreTrainedModel) -> Runtime:
    with _runtimes_lock:
        if model not in _runtimes:
            _runtimes[model] = Runtime(model)
        return _runtimes[model]
