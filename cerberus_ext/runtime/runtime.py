"""What a model's steps need from one decode to the next, and who owns it: a Runtime, kept and freed with the model."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting.context_layer import BoundContext, ContextForward
from ..drafting.drafter import NO_DRAFTER, Drafter
from ..drafting.heads_drafter import HeadsDrafter
from ..target.model import TargetModel
from .capability import Capability, examine
from .fused.context import ContextProgram, FusedContext
from .fused.device_context import DeviceContext
from .fused.proof import StepProof
from .fused.step import FusedStep, records_fused, versions
from .fused.trace import NotFused
from .mapped import give_back, one_by_one
from .past import Past
from .recorder import RECORDERS, Unrecordable
from .recordings import Recordings
from .replayable import hooks_of, memory_of, obstacle
from .sampling import Chooser
from .stats import DecodeStats
from .stepper import Drafts

_TRIED = 64  # tokens of a prompt that a new fused step is tried behind


class _Use:
    """Of a model, as long as this object lives. A lock would stay taken where an interrupt comes before its release."""


class Runtime:
    """Of one model, which it does not keep alive.

    looked_up: what was found for heads (their calibrations), by heads.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._use: Callable[[], _Use | None] = lambda: None  # of who decodes at this moment
        self._capability: tuple[Any, Capability] | None = None
        self._memory: Any = None  # memory_of the model when its capability was last asked for
        self.weights: Any = None  # versions of its tensors when the latest text began
        self._fused: tuple[Any, FusedStep] | None = None
        self._not_fused: tuple[Any, str] | None = None  # why there is none; it is not tried again
        # The program of a context layer, as long as heads with it are bound: recordings replay it. None: there is none.
        self._contexts: weakref.WeakKeyDictionary[BoundContext, Any] = weakref.WeakKeyDictionary()
        self.trials = 0  # which have written over a cache
        self.pasts: list[Past] = []  # of the latest texts
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
            give_back(model)  # of what loading and looking at it has brought there
            self._capability = (key, examine(model))
            give_back(model)
        return self._capability[1]

    def target(self, capacity: int, **options: Any) -> TargetModel:
        """The model for steps of one's own, as TargetModel. Not while another decode of it runs: see `sole`."""
        return TargetModel(self.model, self.capability().way, capacity, **options)

    @contextmanager
    def sole(self) -> Iterator[None]:
        """While inside, another decode of the model is refused: both would switch its attention and use its memory."""
        mine = _Use()
        with self._lock:
            if self._use() is not None:
                raise RuntimeError(
                    "decode: model must not be decoding already, another thread, or a gate, streamer or stopping"
                    " criterion that was called from a decode, uses it at this moment: take turns, or decode with a"
                    " copy of it"
                )
            self._use = weakref.ref(mine)
        try:
            yield
        finally:
            del mine  # where an interrupt comes before it, the end of its traceback

    @property
    def state(self) -> tuple[Any, Any]:
        """Changes with the model's modules and tensors, as the latest decode has found them."""
        return self._memory, self.weights

    def bind(self, drafts: Drafts) -> Drafter:
        """The drafter of the heads, the same as long as these and the model stay as they are."""
        heads, model = drafts.heads, self.model
        tensors = [*heads.parameters(), *heads.buffers()] if isinstance(heads, torch.nn.Module) else []
        key = None if not tensors else (versions(tensors), versions(model.parameters()), model.dtype)
        if key is not None and self._bound is not None and self._bound[0]() is heads and self._bound[1] == key:
            drafter = self._bound[2]
        else:
            drafter = heads.bind(model)  # also where they are not asked: they have to fit
            self._bound = None if key is None else (weakref.ref(heads), key, drafter)
            if key is not None:
                give_back(model)  # a drafter has copies of what it reads at every step
        if not isinstance(drafter, Drafter):
            raise TypeError(f"decode: heads.bind must return a Drafter, got {type(drafter).__name__}")
        return drafter if drafts.drafts else NO_DRAFTER

    def put_fused(
        self, target: TargetModel, prompt: Tensor, drafter: Drafter, pack: bool | None, stats: DecodeStats,
        recordings: Recordings | None,
    ) -> Drafter:  # fmt: skip
        """Has the target's steps fused -> the drafter of this text. Raises NotFused where there is no such step.

        recordings: those that are going to record them, or None.
        """
        if isinstance(drafter, HeadsDrafter) and drafter.context is not None:
            # First: it runs the model op by op, whose weights need not be in memory beside those of the fused step.
            drafter = drafter.of_text(self._context_for(drafter.context, target, prompt))
        target.fused = self._fused_for(target, prompt, pack, stats, recordings)
        return drafter

    def _fused_for(
        self, target: TargetModel, prompt: Tensor, pack: bool | None, stats: DecodeStats, recordings: Recordings | None
    ) -> FusedStep:
        """What an earlier decode has made, or a new one, tried on the prompt's beginning. Raises NotFused."""
        model = self.model
        key = (self._memory, self.weights, model.dtype, pack, recordings is None)
        if self._fused is None or self._fused[0] != key:
            self._fused = None  # first, so that there is memory for the new one
            if recordings is not None:
                recordings.use(None)  # it reads the memory of theirs
            if self._not_fused is not None and self._not_fused[0] == key:
                raise NotFused(self._not_fused[1])
            try:
                with self._trial(target):
                    # A step behind them has to have a position, or a prompt that takes all would leave none fused.
                    with one_by_one(model):
                        target.prefill(prompt[:, : max(1, min(_TRIED, target.max_positions - 1))])
                        proof = StepProof(target)
                    fused = FusedStep(target, pack)
                    proof.check(fused)
            except NotFused as error:
                self._not_fused = (key, str(error))
                raise
            self._fused = (key, fused)
            stats.fuse_seconds = fused.seconds
        stats.fused = True
        if stats.no_drafts_because is None:
            stats.exact, stats.inexact_because = True, None  # a program consists of nothing but our ops
        self._fused[1].prepare(target.cache)
        return self._fused[1]

    def _context_for(self, context: BoundContext, target: TargetModel, prompt: Tensor) -> ContextForward | None:
        """The same for a context layer of one text; None: it runs op by op. Raises as `TargetModel.prefill_all`."""
        if context not in self._contexts:
            with self._trial(target), one_by_one(self.model):
                target.prefill_all(prompt[:, :1])
            self._contexts[context] = None
            with suppress(NotFused):
                make: Any = DeviceContext if records_fused(target.model.device) else ContextProgram
                self._contexts[context] = make(context, target.cache)
        found: ContextProgram | DeviceContext | None = self._contexts[context]
        return FusedContext(found) if isinstance(found, ContextProgram) else found

    @contextmanager
    def _trial(self, target: TargetModel) -> Iterator[None]:
        """What is put into the target's cache while inside is forgotten."""
        self.trials += 1
        try:
            yield
        finally:
            target.cache.reset()

    def recorded(self, chooser: Chooser, capacity: int, context: bool) -> Recordings:
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

    def give_up_recording(self, error: Unrecordable) -> None:
        """A step could not be recorded: none is tried again while the model stays as it is."""
        self._recordings, self._failure = None, (memory_of(self.model), str(error))

    def warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(message, stacklevel=2)

    def release(self) -> None:
        """Frees the caches, the static tensors, the recorded steps, the fused step; the next decode makes new ones.

        After this, a model of which a step could not be recorded or fused is tried again.
        """
        self._recordings = self._failure = self._fused = self._not_fused = self._bound = None
        self._contexts.clear()
        self.pasts.clear()


_runtimes: weakref.WeakKeyDictionary[PreTrainedModel, Runtime] = weakref.WeakKeyDictionary()
_runtimes_lock = threading.Lock()


def runtime_of(model: PreTrainedModel) -> Runtime:
    with _runtimes_lock:
        if model not in _runtimes:
            _runtimes[model] = Runtime(model)
        return _runtimes[model]
