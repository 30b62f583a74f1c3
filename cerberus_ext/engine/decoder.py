"""Decoder: a model and its heads, prepared for decoding."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor

from ..drafting.drafter import HeadsLike
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.tree import MAX_NODES, TreePolicy
from ..runtime.stats import DecodeOutput, DecodeStats
from .forked import threads_after_fork
from .text import GeneratedText, ends_streamer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from typing_extensions import Unpack

    from ..runtime.sampling import Chooser
    from ..runtime.stepper import Chunk
    from .plan import Plan


MAX_NEW_TOKENS = 256  # where nothing else is said


class Options(TypedDict, total=False):
    """What a text is generated with, as in `decode`."""

    attention_mask: Tensor | None
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    eos_token_id: int | Sequence[int] | Tensor | None
    stopping_criteria: list[Any] | None
    generation_config: GenerationConfig | None
    logits_processor: list[Any] | None


def _known(options: Options) -> Options:
    """Raises TypeError where one is no option of a text."""
    known = Options.__annotations__
    for name in options:
        if name not in known:
            raise TypeError(f"decode: got an unexpected option {name!r}, those of a text are {', '.join(known)}")
    return options


@dataclass
class _Request:
    """One text that is to be generated, checked."""

    plan: Plan
    text: GeneratedText
    chooser: Chooser
    stats: DecodeStats
    capacity: int
    limit: int  # tokens for which the model has positions, at most as many as were asked for
    asked: int


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
        request = self._request(ids, streamer, **_known(options))
        for _ in self._generate(request, 5, keep):
            pass
        return DecodeOutput(request.text.sequences(), request.stats)

    def stream(self, ids: Tensor | Sequence[int] | Mapping[str, Any], **options: Unpack[Options]) -> Iterator[Chunk]:
        """As `decode`, but yields tokens as they are accepted, and who drafted each of them, see Chunk.

        `stats` are those of this text. From the first chunk on, until the stream ends or is closed, the model is
        decoding: no other text can begin. Arguments are checked at once.
        """
        return self._generate(self._request(ids, None, **_known(options)), 2, True)

    def warm_up(self) -> DecodeStats:
        """Makes the fused step, or records a step of each number of nodes, so that no later text waits for one.

        Returns statistics of which `fused`, `not_fused_because`, `fuse_seconds`, `captures`, `capture_seconds` and
        `fallback` are set. Raises as `decode` for a model that it refuses.
        """
        from ..runtime.runtime import runtime_of
        from ..runtime.sampling import Sampling
        from . import checks

        threads_after_fork()
        checks.check_model(self.model)
        checks.check_autocast(self.model)
        plan, stats, runtime = self._make_plan(), DecodeStats(), runtime_of(self.model)
        if runtime.capability().no_drafts_because:
            plan = plan.without_drafts()
        capacity = 1 + plan.policy.size
        with runtime.steps(plan.drafts, Sampling(), stats, capacity, *self._running) as stepper, torch.inference_mode():
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
        from . import checks

        nodes = checks.check_integer("decode: nodes", nodes, 1, MAX_NODES)
        threads_after_fork()
        checks.check_model(self.model)
        plan, stats, running = self._make_plan(), DecodeStats(), (False, True, self._running[2])
        with (
            runtime_of(self.model).steps(plan.drafts, Sampling(), stats, 1 + nodes, *running) as stepper,
            torch.inference_mode(),
        ):
            stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=self.model.device))
            return explained(stepper.target, StaticPolicy.from_widths([nodes - 1] if nodes > 1 else []).tree)

    def close(self) -> None:
        """Frees what is kept for the model: its caches, recorded steps, fused step; the next text makes new ones.

        They are freed with the model, too. After this, a model of which a step could not be recorded is tried again.
        """
        from ..runtime.runtime import runtime_of

        runtime_of(self.model).release()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _make_plan(self) -> Plan:
        """Anew where what a calibration belongs to has changed."""
        from .plan import make_plan

        return make_plan(self.model, self.heads, *self._drafting)

    def _request(
        self,
        ids: Any,
        put_to: Any,
        *,
        attention_mask: Any = None,
        max_new_tokens: Any = MAX_NEW_TOKENS,
        temperature: Any = 0.0,
        top_k: Any = 0,
        top_p: Any = 1.0,
        seed: Any = 0,
        eos_token_id: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        logits_processor: Any = None,
    ) -> _Request:
        from ..runtime.logit_rules import logit_rules
        from ..runtime.runtime import runtime_of
        from . import checks

        threads_after_fork()
        model = self.model
        checks.check_model(model)
        checks.check_autocast(model)
        ids = checks.prompt_ids(ids, attention_mask, model)
        max_new_tokens = checks.check_integer("decode: max_new_tokens", max_new_tokens, 0)
        sampling = checks.check_sampling(temperature, top_k, top_p, seed)
        checks.check_streamer(put_to)
        plan = self._make_plan()
        stopping = checks.stopping_criteria_list(stopping_criteria)
        checks.check_generation_config(generation_config)
        config = model.generation_config if generation_config is None else generation_config
        eos = checks.eos_token_ids(eos_token_id, config)
        own = checks.callables("logits_processor", logits_processor, "LogitsProcessorList")
        chooser = logit_rules(model, ids, max_new_tokens, eos, sampling, generation_config, own)
        limit = checks.max_new_tokens(model, ids, max_new_tokens)
        capability = runtime_of(model).capability()
        if capability.no_drafts_because:
            plan = plan.without_drafts()
        text = GeneratedText(ids, limit, eos, stopping, put_to)
        self.stats = capability.stats()
        capacity = ids.shape[1] + limit + plan.policy.size
        return _Request(plan, text, chooser, self.stats, capacity, limit, max_new_tokens)

    def _generate(self, request: _Request, stacklevel: int, keep: bool) -> Iterator[Chunk]:
        """stacklevel: of the user's line, for the warning that the model's positions have ended the text."""
        from ..runtime.runtime import runtime_of
        from .loop import generate

        plan, text, stats = request.plan, request.text, request.stats
        if text.ended:  # not a token is asked for
            text.begin()
            return
        runtime = runtime_of(self.model)
        try:
            prompt = text.prompt if keep else None
            with runtime.steps(
                plan.drafts, request.chooser, stats, request.capacity, *self._running, prompt
            ) as stepper:
                yield from generate(stepper, plan, text)
        finally:
            stats.new_tokens = len(text.tokens)
        if len(text.tokens) == request.limit < request.asked and not text.stopped:
            warnings.warn(
                f"decode: max_new_tokens is {request.asked}, but the text ends after {request.limit} tokens:"
                f" {type(self.model).__name__} has no more positions, or would have to read all of it again",
                stacklevel=stacklevel,
            )
