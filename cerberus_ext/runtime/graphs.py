"""Steps as CUDA graphs: a step is recorded once for each number of nodes, then replayed with one launch.

What a recording reads and writes is kept with the model, in a `ModelGraphs`, from one decode to the next: the cache,
the static tensors of static_step.py, the recordings. A later decode of a similar length records nothing.

    open_stepper    decode's steps: replayed where possible, else op by op, and then it says why, once
    release_graphs  frees what is kept for a model

A replay repeats what the recording did, and runs no Python of the model: hooks and autocast would be left out, so a
model with hooks, or decoding under autocast, is not recorded.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..drafting.dynamic_policy import Tree, padded_size
from ..drafting.static_policy import StaticPolicy
from ..target.attention import layer_windows
from ..target.cache import TreeCache
from ..target.model import TargetModel, position_limit, round_capacity, sole_decode
from .replayable import memory_of, obstacle
from .static_step import StaticDrafts, StaticNodes, StaticResult, StaticState, StepKind, run_step
from .stats import DecodeStats
from .stepper import Drafter, HeadsLike, Sampling, Stepper, accepted_path, context_of, drafts_along_paths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .compiled_step import CompiledSteps
    from .logit_rules import LogitRules

_MIN_CAPACITY = 512
# Libraries choose algorithms and take workspaces when they first see a shape, which a recording must not contain.
_WARM_UPS = 2
_MAX_HEADS = 4  # of one model, kept with their recordings


class Unrecordable(Exception):
    """A step cannot be recorded; the message says why."""


class Recorder(Protocol):
    """Records what the device is told to do. All recordings of one recorder may share their temporary memory."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Runs it, where it is going to be recorded."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """-> what does the same again, on the current stream, with the same memory."""

    def fetch(self, source: Tensor, host: Tensor) -> None:
        """Copies a tensor to the host and waits until it is there, for nothing else."""


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()

    def warm_up(self, run: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            try:
                # thread_local: what other threads do meanwhile, a streamer's for instance, is no error.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    run()
            finally:
                # A recording that fails at its end leaves torch on the side stream.
                torch.cuda.set_stream(current)
        return graph.replay

    def fetch(self, source: Tensor, host: Tensor) -> None:
        host.copy_(source, non_blocking=True)  # pinned
        self._copied.record(torch.cuda.current_stream(self._device))
        self._copied.synchronize()


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by the type of the device


def expected_on(device: torch.device) -> bool:
    """Whether a user wants to know that there are no graphs."""
    return device.type == "cuda"


class KeptHeads:
    """Heads bound to a model, and the tensors for their drafts, by how many drafts there are."""

    def __init__(self, heads: HeadsLike, drafter: Drafter) -> None:
        self.heads = weakref.ref(heads)
        self.drafter = drafter
        self.drafts: dict[int, StaticDrafts] = {}


class ModelGraphs:
    """What is kept for a model: cache, static tensors, recordings. It does not keep the model itself."""

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int, context: bool) -> None:
        """context: whether there is room for heads with a context layer."""
        limit = min(position_limit(model), 1 << 40)
        bucket = max(_MIN_CAPACITY, 1 << (capacity - 1).bit_length())  # the next power of two
        capacity = min(bucket, round_capacity(max(capacity, limit)))
        self.recorder = RECORDERS[model.device.type](model.device)
        self.batch = batch
        self.device = model.device
        self.cache = TreeCache(len(layer_windows(model.config)), capacity, batch, model.device, context)
        self.memory = memory_of(model)
        self.state: StaticState | None = None
        self._nodes: dict[int, StaticNodes] = {}
        self._heads: list[KeptHeads] = []
        self._host_drafts: dict[tuple[int, int], StaticDrafts] = {}  # (K, P) -> those of heads that cannot be kept
        self._recordings: dict[StepKind, tuple[StaticResult, Callable[[], None]]] = {}

    def fits(self, model: PreTrainedModel, capacity: int, batch: int, context: bool) -> bool:
        """Whether the recordings still do what the model does, for so many tokens."""
        roomy = self.cache.capacity >= capacity and self.cache.context >= context
        return roomy and self.batch == batch and self.memory == memory_of(model)

    def begin(self, hidden: Tensor, root: Tensor) -> StaticState:
        """hidden (B, D), root (B,) after the prompt -> the state, with them in it."""
        if self.state is None:
            self.state = StaticState(hidden.clone(memory_format=torch.contiguous_format), root.clone())
        self.state.hidden.copy_(hidden)
        self.state.root.copy_(root)
        return self.state

    def nodes(self, size: int) -> StaticNodes:
        if size not in self._nodes:
            self._nodes[size] = StaticNodes(self.batch, size, self.device)
        return self._nodes[size]

    def bind(self, model: PreTrainedModel, heads: HeadsLike, drafts: int) -> tuple[Drafter, StaticDrafts]:
        """heads.bind(model), and where its drafts go. What an earlier decode has bound serves again, where it fits.

        Raises Unrecordable for drafts that depend on the tree.
        """
        kept = next((kept for kept in self._heads if kept.heads() is heads), None)
        if kept is None or not kept.drafter.rebind(heads, model):  # type: ignore[attr-defined]
            drafter = heads.bind(model)
            if drafts_along_paths(drafter):
                raise Unrecordable("the heads draft along the paths of the tree, one depth after the other")
            if not hasattr(drafter, "rebind"):
                size = (heads.config.num_heads, drafts)
                if size not in self._host_drafts:
                    self._host_drafts[size] = StaticDrafts(None, self.batch, *size, self.device)
                return drafter, self._host_drafts[size]
            self._forget_heads(kept)
            kept = KeptHeads(heads, drafter)
            self._heads.append(kept)
        if drafts not in kept.drafts:
            kept.drafts[drafts] = StaticDrafts(kept.drafter, self.batch, heads.config.num_heads, drafts, self.device)
        return kept.drafter, kept.drafts[drafts]

    def recording(
        self, base: TargetModel, kind: StepKind, stats: DecodeStats
    ) -> tuple[StaticResult, Callable[[], None]]:
        """The recorded step, recorded now if it is not there. Raises Unrecordable; the state is then as it was."""
        if kind not in self._recordings:
            begin = time.perf_counter()
            try:
                self._recordings[kind] = self._record(base, kind)
            finally:
                stats.capture_seconds += time.perf_counter() - begin
            stats.captures += 1
        return self._recordings[kind]

    def _record(self, base: TargetModel, kind: StepKind) -> tuple[StaticResult, Callable[[], None]]:
        # Numbers of the sampling are part of a recording, and there is no end of seeds.
        samplings = (kind.sampling, Sampling())
        self._recordings = {other: step for other, step in self._recordings.items() if other.sampling in samplings}
        state, nodes = self.state, self.nodes(kind.nodes)
        assert state is not None
        result = StaticResult(self.batch, kind.nodes, kind.drafts if kind.drafts_after else None, self.device)
        changed = [state.hidden, state.root, self.cache.length]  # slots from length on hold nothing that counts
        if kind.drafts is not None:
            changed += [kind.drafts.ids, kind.drafts.logprobs]
        saved = [tensor.clone() for tensor in changed]

        def run() -> None:
            run_step(base, kind, state, nodes, result)

        try:
            for _ in range(_WARM_UPS):
                self.recorder.warm_up(run)
                torch._foreach_copy_(changed, saved)
            return result, self.recorder.record(run)
        except Unrecordable:
            raise
        except Exception as error:
            raise Unrecordable(f"recording a step failed: {type(error).__name__}: {error}") from error
        finally:
            torch._foreach_copy_(changed, saved)

    def _forget_heads(self, outdated: KeptHeads | None) -> None:
        """Makes room for others: `outdated`, those that are gone, and the oldest of too many."""
        serving = [one for one in self._heads if one is not outdated and one.heads() is not None]
        self._heads = serving[-(_MAX_HEADS - 1) :]
        drafts = {None, *self._host_drafts.values()}.union(*(one.drafts.values() for one in self._heads))
        contexts = {None, *(context_of(one.drafter) for one in self._heads)}
        self._recordings = {
            kind: step for kind, step in self._recordings.items() if kind.drafts in drafts and kind.context in contexts
        }


class GraphedStepper(Stepper):
    """Replays the steps; from the first one on that cannot be recorded, they run op by op."""

    def __init__(
        self, base: TargetModel, graphs: ModelGraphs, drafter: Drafter, drafts: StaticDrafts | None,
        ahead: bool, sampling: Sampling, stats: DecodeStats, give_up: Callable[[Unrecordable], None],
    ) -> None:  # fmt: skip
        """ahead: the gate wants to see the drafts. give_up: called where a step cannot be recorded; may raise."""
        super().__init__(base, drafter, 0 if drafts is None else drafts.drafts, sampling, stats)
        self._graphs: ModelGraphs | None = graphs
        self._static_drafts = drafts
        recorded = drafts is not None and drafts.drafter is not None
        self._drafts_before = recorded and not ahead
        self._drafts_after = recorded and ahead
        self._give_up = give_up
        self._entropy: float | None = None
        self._ahead: tuple[Tensor, Tensor] | None = None  # ids, logprobs (B, K, P) for this step, on the host

    def entropy(self) -> float:
        return super().entropy() if self._entropy is None else self._entropy

    def logprobs(self) -> Tensor:
        return super().logprobs() if self._ahead is None else self._ahead[1]

    def drafts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self._ahead is None:
            return super().drafts()
        ids, logprobs = self._ahead
        return ids[0].numpy(), logprobs[0].numpy()

    def step(self, tree: StaticPolicy | Tree, deepest: int) -> list[int]:
        cut = tree.cut(deepest)
        recording = self._prepare(tree, cut)
        if recording is None:
            return super().step(tree, deepest)
        assert self._graphs is not None
        with self.stats.phase("verify"):
            result, replay = recording
            replay()
            self._graphs.recorder.fetch(result.buffer, result.host)
            target, path, self._entropy, self._ahead = result.read()
        with self.stats.phase("commit"):
            self._drafted = None
            self.stats.graphed_steps += 1
            path = accepted_path(path)
            self._count(path, cut)
        return [target[node] for node in path]

    def _prepare(
        self, tree: StaticPolicy | Tree, cut: StaticPolicy | Tree
    ) -> tuple[StaticResult, Callable[[], None]] | None:
        """Puts everything where the recording of a step with `tree` finds it, of which only `cut` is checked."""
        if self._graphs is None:
            return None
        with self.stats.phase("draft"):
            is_open = tree.size > 1
            # The sizes of a StaticPolicy are few; those of the others are made few.
            nodes = tree.size if isinstance(tree, StaticPolicy) else padded_size(tree.size)
            reads_drafts = is_open and isinstance(tree, StaticPolicy)
            kind = StepKind(
                nodes,
                self.sampling,
                self._static_drafts if reads_drafts or self._drafts_after else None,
                self._drafts_before and is_open,
                self._drafts_after,
                self.context,
            )
            if reads_drafts and not self._drafts_before and self._ahead is None:
                assert self._static_drafts is not None
                self._static_drafts.put(*self._draft())  # the last step has left no drafts
            self._graphs.nodes(nodes).put(cut, self.max_drafts)
        assert self.base.cache.committed + nodes <= self.base.cache.capacity  # nothing checks it in a replay
        try:
            return self._graphs.recording(self.base, kind, self.stats)
        except Unrecordable as error:
            self._graphs = self._entropy = self._ahead = None
            self._give_up(error)
            return None

    def _start(self, hidden: Tensor, root: Tensor) -> None:
        if self._graphs is not None:
            state = self._graphs.begin(hidden, root)
            hidden, root = state.hidden, state.root
        super()._start(hidden, root)


_kept: weakref.WeakKeyDictionary[PreTrainedModel, ModelGraphs] = weakref.WeakKeyDictionary()
# Models of which a step could not be recorded, and why. It is not tried again.
_failed: weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, str]] = weakref.WeakKeyDictionary()
_said: set[str] = set()


def release_graphs(model: PreTrainedModel) -> None:
    """Frees the cache, the static tensors and the CUDA graphs that `decode` keeps for a model; the next one makes new.

    They are freed with the model, too. After this, a model of which a step could not be recorded is tried again.
    """
    _kept.pop(model, None)
    _failed.pop(model, None)


@contextmanager
def open_stepper(
    model: PreTrainedModel, heads: HeadsLike, capacity: int, batch: int, drafts: int, ahead: bool,
    sampling: Sampling, stats: DecodeStats, graphs: bool | None, compiled: CompiledSteps | None = None,
    rules: LogitRules | None = None,
) -> Iterator[Stepper]:  # fmt: skip
    """Steps of one decode, with the model prepared for them while inside.

    capacity: tokens that the cache has to hold. drafts: per head, 0 where no tree has any. ahead: the gate wants to
    see the drafts. graphs: as in `decode`. compiled: does the target model's steps, which are not recorded then. rules:
    process the logits, in steps that are not recorded.
    """

    def fall_back(error: Unrecordable) -> None:
        if graphs:
            raise ValueError(f"decode: graphs must be None or False here, got True: {error}") from error
        stats.fallback = str(error)
        if expected_on(model.device) and stats.fallback not in _said:
            _said.add(stats.fallback)
            warnings.warn(f"decode: no CUDA graphs, each op is launched by itself: {error}", stacklevel=2)

    def give_up(error: Unrecordable) -> None:
        release_graphs(model)
        _failed[model] = (memory_of(model), str(error))
        fall_back(error)

    context = drafts > 0 and getattr(heads.config, "context_layer", False)
    with sole_decode(model):
        kept = None
        if graphs is not False and compiled is None:
            try:
                if rules is not None:
                    fields = ", ".join(rules.fields)
                    raise Unrecordable(f"the logits are processed as model.generation_config says ({fields})")
                kept = _graphs_of(model, capacity, batch, context)
                drafter, static = kept.bind(model, heads, drafts) if drafts else (heads.bind(model), None)
            except Unrecordable as error:
                kept = None
                fall_back(error)
        if kept is None:
            drafter = heads.bind(model)
            with TargetModel(model, capacity, batch, compiled=compiled, context=context) as base:
                yield Stepper(base, drafter, drafts, sampling, stats, rules)
        else:
            with TargetModel(model, capacity, batch, kept.cache) as base:
                yield GraphedStepper(base, kept, drafter, static, ahead, sampling, stats, give_up)


def _graphs_of(model: PreTrainedModel, capacity: int, batch: int, context: bool) -> ModelGraphs:
    """Those that are kept, or new ones. Raises Unrecordable."""
    if model.device.type not in RECORDERS:
        raise Unrecordable(f"the model is on {model.device}, not on a CUDA device")
    if reason := obstacle(model, "a replay"):
        raise Unrecordable(reason)
    memory, failure = _failed.get(model, (None, ""))
    if failure and memory == memory_of(model):
        raise Unrecordable(failure)
    kept = _kept.get(model)
    if kept is None or not kept.fits(model, capacity, batch, context):
        release_graphs(model)  # first, so that there is memory for the new ones
        kept = None
        kept = _kept[model] = ModelGraphs(model, capacity, batch, context)
    return kept
