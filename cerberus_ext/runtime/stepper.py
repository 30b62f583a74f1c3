"""The steps of one decode, as the host sees them: it hands over a tree and gets the tokens that the step added.

Texts that are decoded together have a Stepper each, and share what reads weights: the forward and the heads' drafts.

Letters: B rows (1 of a Stepper), N nodes of the step's tree, K heads, P drafts per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .. import ops
from ..drafting.conditional import BoundConditional, ConditionalLogprobs
from ..drafting.drafter import NO_DRAFTER, Drafter, DraftRow, HeadsLike
from ..drafting.proposers import HeadsDrafts
from ..drafting.tree import ALONE, Tree, filled_size, tree_of_ranks
from ..target.model import TargetModel
from .recorder import Unrecordable
from .recordings import Recorded, Recordings
from .sampling import Chooser
from .static_result import Read, StaticResult
from .static_step import Drafting, StepKind, StepMemory, run_step
from .stats import DecodeStats, shared_phase
from .together import TextStep, run_together


@dataclass(frozen=True)
class Drafts:
    """How the heads take part in a decode.

    drafts       P: how many of each head any tree looks at; 0: the heads are not asked
    conditional  whether they are weighed by the token before, where the heads know how to
    looks        whether the host wants to see the drafts before it has a tree
    sizes        numbers of nodes that steps are recorded for
    """

    heads: HeadsLike
    drafts: int
    conditional: bool
    looks: bool
    sizes: tuple[int, ...]


class Chunk(NamedTuple):
    """Tokens that were accepted together, and who drafted each: HEADS (0), the first of decode's `proposers` (1) ...;
    None: nobody, it is the target model's own. row: of the prompts, from 0 on, which these tokens belong to."""

    tokens: list[int]
    proposers: list[int | None]
    row: int = 0

    def first(self, count: int, row: int = 0) -> Chunk:
        return Chunk(self.tokens[:count], self.proposers[:count], row)


class BegunStep(NamedTuple):
    """A step that is ready to run. recorded: what replays it whole; None: nothing does."""

    tree: Tree
    kind: StepKind
    recorded: Recorded | None


def prefill(target: TargetModel, drafter: Drafter, ids: Tensor, reused: int = 0) -> tuple[Tensor, Tensor]:
    """ids (B, S): the prompt, of which the drafter is told -> hidden (B, D) and logits (B, V) of its last position.

    reused: tokens of it that are in the cache, with one pair more of a drafter with a context.
    """
    target.cache.extend(reused)
    ids = ids[:, reused:]
    if not drafter.has_context:
        return target.prefill(ids)
    states, logits = target.prefill_all(ids)  # (B, S, D), (B, V)
    drafter.keep_prompt(target.cache, states, ids)
    return states[:, -1], logits


class Stepper:
    """`prefill` once, then `step` as often as needed.

    recordings: steps are recorded and replayed; None: they run op by op. give_up: called where a step cannot be
    recorded; from there on they run by themselves. It may raise. begin: called with the prompt before anything runs
    -> how much of it is reused, see `prefill`, and the drafter of this text.
    texts: the Steppers of the texts that are decoded at this moment.
    """

    def __init__(
        self, target: TargetModel, drafts: Drafts, drafter: Drafter, chooser: Chooser, stats: DecodeStats,
        recordings: Recordings | None, give_up: Callable[[Unrecordable], None],
        begin: Callable[[TargetModel, Tensor], tuple[int, Drafter]], texts: Sequence[Stepper] = (),
    ) -> None:  # fmt: skip
        self.target = target
        self.stats = stats
        self.max_drafts = drafts.drafts
        self._drafts = drafts
        self._drafter = drafter
        self._chooser = chooser
        self._recordings = recordings
        self._give_up = give_up
        self._begin = begin
        self._texts = texts
        self._text: list[int] = []
        self._memory = StepMemory(target.cache) if recordings is None else recordings.memory
        self._shape = (drafts.heads.config.num_heads, drafts.drafts) if drafts.drafts else None
        self._results: dict[int, StaticResult] = {}
        self._drafted: tuple[Tensor, Tensor] | None = None  # of this step, on the device: ids, logprobs (B, K, P)
        # The same of row 0, on the host: as the last step has brought them, or as they were asked for.
        self._fetched: HeadsDrafts | None = None
        self._seen: HeadsDrafts | None = None
        self._entropy: float | None = None

    @property
    def hidden(self) -> Tensor:
        """(B, D): what the pending token was chosen from. Another step writes over it."""
        return self._memory.state.hidden

    def prefill(self, ids: Tensor) -> list[int]:
        """ids (1, S): the prompt -> the first new token."""
        reused, self._drafter = self._begin(self.target, ids)
        if because := self._chooser.inexact_because:
            self.stats.exact, self.stats.inexact_because = False, because
        hidden, logits = prefill(self.target, self._drafter, ids, reused)  # (B, D), (B, V)
        self.stats.reused_tokens = reused
        pending = self._chooser.first(logits, self.target.cache.length)  # (B,); the cache's length is its position
        self._memory.begin(hidden, pending)
        first = pending.tolist()
        self._chooser.extend(first)
        self._text = ids[0].tolist() + first
        return first

    def kept(self) -> list[int]:
        """The tokens whose keys and values are in the cache, whatever has ended the steps; none before the first."""
        return self._text[: self._drafter.kept(self.target.cache)]

    def max_depth(self) -> int:
        """How deep a tree may be at the next step, for no node to have a position that the model does not know."""
        return self.target.max_depth()

    def entropy(self) -> float:
        """In nats, of softmax(hidden)."""
        return ops.hidden_entropy(self.hidden)[0].item() if self._entropy is None else self._entropy

    def drafts(self) -> HeadsDrafts:
        """The heads' drafts for row 0; of shape (0, 0) where no tree has any."""
        if self._shape is None:
            return HeadsDrafts(np.empty((0, 0), np.int64), np.empty((0, 0), np.float32))
        if self._fetched is not None:
            return self._fetched
        if self._seen is None:
            ids, logprobs = self._draft()
            weighs = self._weighs()
            after = None if weighs is None else weighs.for_search(ids, logprobs)
            self._seen = HeadsDrafts(ids[0].numpy(force=True), logprobs[0].numpy(force=True), after)
        return self._seen

    def _weighs(self) -> BoundConditional | None:
        """What weighs the drafts by the token before; None: nothing does."""
        return self._drafter.conditional if self._drafts.conditional else None

    def step(self, tree: Tree) -> Chunk:
        """One forward over `tree` -> the tokens that it adds to the text, at least one."""
        return step_together([self], [tree])[0]

    def begin(self, tree: Tree) -> BegunStep:
        """Puts everything where the step with `tree` finds it."""
        with self.stats.phase("draft"):
            tree = self._with_drafts(tree)
        return self._prepare(tree)

    def run(self, step: BegunStep) -> StaticResult:
        """The step by itself -> where the host is to `read` what comes out of it."""
        if step.recorded is not None:
            result, replay = step.recorded
            replay()
            return result
        size = step.kind.nodes
        if size not in self._results:
            self._results[size] = self._memory.result(step.kind)
        run_step(self.target, step.kind, self._memory, self._results[size])
        return self._results[size]

    def read(self, result: StaticResult) -> Read:
        """The one place where the host waits."""
        if self._recordings is not None:
            self._recordings.recorder.fetch(result.buffer, result.host)
        else:
            result.host.copy_(result.buffer)
        return result.read()

    def finish(self, tree: Tree, read: Read) -> Chunk:
        """After the step with `tree` has run -> the tokens that it adds to the text."""
        target, path, entropy, fetched = read
        self._drafted, self._seen, self._entropy = None, None, entropy
        self._fetched = None
        if fetched is not None:
            ids, logprobs, after = fetched
            weighs = self._weighs()
            given = None if weighs is None else ConditionalLogprobs(weighs.tables, after)
            self._fetched = HeadsDrafts(ids, logprobs, given)
        self.target.cache.committed += len(path)
        tokens = [target[node] for node in path]
        self._chooser.extend(tokens)
        self._text += tokens
        proposers = [int(tree.proposers[node]) for node in path[1:]]
        self.stats.count_step(tree.size, path[1:], proposers)
        return Chunk(tokens, [*proposers, None])

    def prepare(self, nodes: int) -> None:
        """Records the step of so many nodes, where steps are recorded and that has not been done. After `prefill`."""
        if self._recordings is not None:
            names_drafts = nodes > 1 and not self._drafts.looks
            star = tree_of_ranks([-1, *[0] * (nodes - 1)], [0] * nodes)
            self._memory.nodes(nodes).put(star if names_drafts else replace(star, ranks=None), self.max_drafts)
            self._recordings.step(self.target, self._kind(nodes, names_drafts), self.stats)

    def _with_drafts(self, tree: Tree) -> Tree:
        """The tree, after the drafts that it names by their ranks were put where the step finds them."""
        if tree.ranks is None or self._fetched is not None or self._kind(tree.size, True).drafting is Drafting.BEFORE:
            return tree
        assert self._shape is not None
        ids, logprobs = self._draft()
        if self._recordings is None:
            named = ids[0].numpy(force=True)[tree.depths[1:] - 1, tree.ranks[1:]]
            if not ((named >= 0) & (named < self.target.vocabulary)).any():  # nothing was drafted
                return ALONE
        self._memory.drafts(self._shape).put(ids, logprobs)
        return tree

    def _kind(self, nodes: int, names_drafts: bool) -> StepKind:
        """names_drafts: whether the tokens of some nodes are on the device."""
        if self._recordings is None:
            return StepKind(nodes, self._chooser, self._drafter, self._shape if names_drafts else None)
        drafting, conditional = Drafting.NEVER, False
        if self._drafter.recordable and self._drafts.looks:
            drafting, conditional = Drafting.AFTER, self._weighs() is not None
        elif self._drafter.recordable and names_drafts:
            drafting = Drafting.BEFORE
        involved = drafting is not Drafting.NEVER or self._drafter.has_context
        shape = self._shape if names_drafts or drafting is Drafting.AFTER else None
        size = filled_size(nodes, self._drafts.sizes)
        chooser = self._memory.choosers.of(self._chooser)
        return StepKind(size, chooser, self._drafter if involved else NO_DRAFTER, shape, drafting, conditional)

    def _prepare(self, tree: Tree) -> BegunStep:
        """With a tree whose drafts are where they have to be."""
        kind = self._kind(tree.size, tree.ranks is not None)
        with self.stats.phase("draft"):
            self._memory.nodes(kind.nodes).put(tree, self.max_drafts)
        if self._recordings is None:
            return BegunStep(tree, kind, None)
        cache = self.target.cache
        assert cache.committed + kind.nodes <= cache.capacity  # nothing checks it in a replay
        try:
            recorded = self._recordings.step(self.target, kind, self.stats)
        except Unrecordable as error:
            self._recordings = None
            self._give_up(error)
            return self._prepare(self._with_drafts(tree))
        self.stats.graphed_steps += 1
        return BegunStep(tree, kind, recorded)

    def _draft(self) -> tuple[Tensor, Tensor]:
        """The heads' drafts and their log-probabilities, (B, K, P) each; made once a step, for all texts at once where
        that is the same."""
        if self._drafted is None:
            others = self._texts if self._drafter.recordable and self._recordings is None else ()
            texts = [self, *(text for text in others if text is not self and text._drafted is None)]
            rows = [DraftRow(text._drafter, text.target.cache, *text._memory.state) for text in texts]
            ids, logprobs = self._drafter.propose_together(rows, self.max_drafts)
            for text, *drafted in zip(texts, ids.split(1), logprobs.split(1), strict=True):
                text._drafted = (drafted[0], drafted[1])
        assert self._drafted is not None
        return self._drafted


def step_together(texts: Sequence[Stepper], trees: Sequence[Tree]) -> list[Chunk]:
    """A step of each text, with its tree -> the tokens that it adds to each, at least one. The forwards are one where
    steps are fused, and come one after the other where they are not."""
    stats = [text.stats for text in texts]
    steps = [text.begin(tree) for text, tree in zip(texts, trees, strict=True)]
    with shared_phase(stats, "verify"):
        fused = texts[0].target.fused
        if len(texts) > 1 and fused is not None:
            together = zip(texts, steps, strict=True)
            found = run_together(fused, [TextStep(text.target, step.kind, text._memory) for text, step in together])
        else:
            results = [text.run(step) for text, step in zip(texts, steps, strict=True)]
            found = [text.read(result) for text, result in zip(texts, results, strict=True)]
    with shared_phase(stats, "commit"):
        return [text.finish(step.tree, read) for text, step, read in zip(texts, steps, found, strict=True)]
