"""Decoder: a model and its heads, prepared for decoding."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypedDict
from weakref import WeakSet

import torch
from torch import Tensor

from ..drafting.drafter import HeadsLike
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.tree import MAX_NODES, TreePolicy
from ..runtime.stats import DecodeOutput, DecodeStats, stats_of
from .forked import threads_after_fork
from .text import SLOTS, ends_streamer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from typing_extensions import Unpack

    from ..runtime.stepper import Chunk
    from .batch import Batch
    from .plan import Plan
    from .request import Requests


class Options(TypedDict, total=False):
    """What a text is generated with, as in `decode`."""

    attention_mask: Tensor | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    acceptance: str
    eos_token_id: int | Sequence[int] | Tensor | None
    stopping_criteria: list[Any] | None
    generation_config: GenerationConfig | None
    logits_processor: list[Any] | None
    slots: int


def _known(options: Options) -> Options:
    """Raises TypeError where one is no option of a text."""
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"decode: got an unexpected option {name!r}, those of a text are {', '.join(known)}")
    return options


class Decoder:
    """Decodes with one model and one way of drafting.

    model, heads, tree, gate, proposers, graphs, fuse, pack: as in `decode`. What lives longer than a text (the
    model's capability, its cache, recorded steps, the fused step) is the model's, in
    `runtime.runtime_of(model)`: decoders of one model share it, and `decode` finds it again.

    Raises TypeError or ValueError, naming the argument, where one is wrong. A context manager: `close` at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        heads: HeadsLike | None = None,
        *,
        tree: int | TreePolicy | None = None,
        gate: Gate | None = None,
        proposers: Sequence[ProposerFactory] | None = None,
        graphs: bool | None = None,
        fuse: bool | None = None,
        pack: bool | None = None,
    ) -> None:
        # Here, and not above: they import transformers, which takes seconds and is not needed to look at a tree.
        from . import checks

        threads_after_fork()
        checks.check_model(model)
        for name, value in (("graphs", graphs), ("fuse", fuse), ("pack", pack)):
            checks.check_choice(name, value)
        self.model = model
        self.heads = heads
        self.stats: DecodeStats | None = None  # of the latest text, also while it is generated
        self._drafting = (tree, gate, proposers)
        self._running = (graphs, fuse, pack)
        self._streams: WeakSet[Generator[Chunk]] = WeakSet()
        self._make_plan()

    @ends_streamer
    def decode(
        self, ids: Tensor | Sequence[int] | Mapping[str, Any], *, streamer: Any = None, **options: Unpack[Options]
    ) -> DecodeOutput:
        """ids, streamer and options: as in `decode`, which says what it returns and raises.

        On a CPU the text's keys and values are kept: of the next prompt, what it has in common with this text from the
        beginning on is not read again (`stats.reused_tokens`), and nothing of the result depends on that.
        """
        return self.run(ids, streamer=streamer, keep=True, **options)

    def run(self, ids: Any, *, streamer: Any = None, keep: bool = False, **options: Unpack[Options]) -> DecodeOutput:
        """As `decode`, but `streamer.end` is the caller's to call. keep: the text's keys and values, for the next."""
        requests = self._requests(ids, streamer, _known(options))
        for _ in self._generate(requests, 5, keep):
            pass
        assert self.stats is not None
        new = [request.text.tokens for request in requests.texts]
        return DecodeOutput(requests.prompts.sequences(new, requests.pad), self.stats)

    def stream(self, ids: Tensor | Sequence[int] | Mapping[str, Any], **options: Unpack[Options]) -> Iterator[Chunk]:
        """As `decode`, but yields tokens as they are accepted, and who drafted each of them, see Chunk.

        `stats` are those of this text. From the first chunk on, until the stream ends or is closed, the model is
        decoding: no other text can begin. Arguments are checked at once.
        """
        stream = self._generate(self._requests(ids, None, _known(options)), 2, True)
        self._streams.add(stream)
        return stream

    def batch(self, slots: int = SLOTS) -> Batch:
        """Texts that may be added while others are decoded, at most `slots` of them at once.

        Raises TypeError or ValueError where `slots` is no number from 1 on.
        """
        from .batch import Batch
        from .checks import check_integer

        slots = check_integer("decode: slots", slots, 1)
        return Batch(lambda ids, options: self._requests(ids, None, options), self.model, self._running, slots)

    def warm_up(self) -> DecodeStats:
        """Makes the fused step, or records a step of each number of nodes, so that no later text waits for one.

        Returns statistics of which `fused`, `not_fused_because`, `fuse_seconds`, `captures`, `capture_seconds` and
        `fallback` are set. Raises as `decode` for a model that it refuses.
        """
        from ..runtime.runtime import runtime_of
        from ..runtime.sampling import Sampling
        from ..runtime.session import Running, steps
        from . import checks

        threads_after_fork()
        checks.check_model(self.model)
        checks.check_autocast(self.model)
        plan, stats, runtime = self._make_plan(), DecodeStats(), runtime_of(self.model)
        if runtime.capability().no_drafts_because:
            plan = plan.without_drafts()
        capacity = 1 + plan.policy.size
        with (
            steps(runtime, plan.drafts, Sampling(), stats, capacity, Running(*self._running)) as stepper,
            torch.inference_mode(),
        ):
            stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=self.model.device))
            for size in plan.policy.sizes:
                stepper.prepare(size)
        return stats

    def explain(self, nodes: int = 1) -> str:
        """The program of a step of the model, a line for each stage with the time that it takes over so many nodes.

        Raises ValueError, naming the reason, for a model without one.
        """
        from ..drafting.static_policy import StaticPolicy
        from ..runtime.fused.measure import explained
        from ..runtime.runtime import runtime_of
        from ..runtime.sampling import Sampling
        from ..runtime.session import Running, steps
        from . import checks

        nodes = checks.check_integer("decode: nodes", nodes, 1, MAX_NODES)
        threads_after_fork()
        checks.check_model(self.model)
        plan, stats, running = self._make_plan(), DecodeStats(), Running(False, True, self._running[2])
        with (
            steps(runtime_of(self.model), plan.drafts, Sampling(), stats, 1 + nodes, running) as stepper,
            torch.inference_mode(),
        ):
            stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=self.model.device))
            return explained(stepper.target, StaticPolicy.from_widths([nodes - 1] if nodes > 1 else []).tree)

    def close(self) -> None:
        """Ends the streams, and frees what is kept for the model: its caches, recorded steps, fused step; the next text
        makes new ones.

        They are freed with the model, too. After this, a model of which a step could not be recorded is tried again.
        """
        from ..runtime.runtime import runtime_of

        for stream in list(self._streams):
            with suppress(ValueError):  # it is running: this is called from one of its callbacks
                stream.close()
        runtime_of(self.model).release()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_plan(self) -> Plan:
        """Anew where what a calibration belongs to has changed."""
        from .plan import make_plan

        return make_plan(self.model, self.heads, *self._drafting)

    def _requests(self, ids: Any, put_to: Any, options: Mapping[str, Any]) -> Requests:
        from . import checks
        from .request import make_requests

        threads_after_fork()
        checks.check_model(self.model)
        checks.check_autocast(self.model)
        requests = make_requests(self.model, self._make_plan(), ids, put_to, **options)
        self.stats = stats_of([request.stats for request in requests.texts])
        return requests

    def _generate(self, requests: Requests, stacklevel: int, keep: bool) -> Generator[Chunk]:
        """stacklevel: of the user's line, for the warning that the model's positions have ended a text."""
        from ..runtime.runtime import runtime_of
        from ..runtime.session import Running, session
        from .loop import generate

        texts, stats = requests.texts, self.stats
        assert stats is not None
        if texts[0].text.ended:  # not a token is asked for
            for request in texts:
                request.text.begin()
            return
        running = Running(*self._running, requests.slots)
        try:
            with session(runtime_of(self.model), requests.plan.drafts, running) as texts_of_it:
                yield from generate(texts_of_it, requests.plan, deque(texts), requests.slots, keep)
        finally:
            for request in texts:
                request.stats.new_tokens = len(request.text.tokens)
                request.stats.processor_seconds = request.chooser.seconds
            stats.sum_rows()
        for request in texts:
            request.warn_where_positions_ended(self.model, stacklevel)
