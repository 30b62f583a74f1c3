"""What a decode returns: the tokens, and what happened on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

PHASES = ("prefill", "draft", "verify", "commit")


@dataclass
class StepCounts:
    """How many steps there were, and of which kind.

    steps              forwards of the target model after the prompt's
    open_steps         steps for which the gate gave a tree
    zero_accept_steps  open steps that accepted no draft
    """

    steps: int = 0
    open_steps: int = 0
    zero_accept_steps: int = 0

    @property
    def gate_open_rate(self) -> float:
        """Share of the steps that carried drafts."""
        return self.open_steps / self.steps if self.steps else 0.0

    @property
    def zero_accept_rate(self) -> float:
        """Share of the open steps that accepted nothing."""
        return self.zero_accept_steps / self.open_steps if self.open_steps else 0.0


@dataclass
class DecodeStats(StepCounts):
    """Counts and times of one `decode`.

    new_tokens         tokens generated; the first one comes with the prompt's forward, before any step
    reused_tokens      tokens of the prompt that were not read again, since one of the Decoder's texts began with them
    accepted_histogram entry [a]: steps that accepted a drafts (each also added the target model's own next token)
    step_tokens        tokens that steps added, before the last step's were cut at the end of the text
    trace              entry [i]: of step i, how many nodes its tree had, and which of them it accepted, the root left
                       out: from each came a token that was drafted, behind them one of the target model
    trace_proposers    entry [i]: of step i, who had drafted each of those: 0 the heads (the k-th node's token head
                       k), 1 the first of decode's `proposers` ...
    seconds            per phase, by the host's clock: prefill; draft (gate, heads, tree); verify (the step on the
                       device, until the host has read what came out); commit (counting, handing out tokens). Heads
                       that are part of a recording count as verify
    processor_seconds  what logits processors took, part of the prefill's and verify's `seconds`
    graphed_steps      steps that were replayed from CUDA graphs
    captures           graphs that had to be recorded; none where an earlier decode left those that are needed
    capture_seconds    what recording them took; not part of `seconds`
    fused              whether steps ran as one native program each; on a GPU, recorded or not
    not_fused_because  why not; None: they did, or `fuse` was False
    fuse_seconds       what tracing the model, planning its program and packing its weights took, once for a model; part
                       of the prefill's `seconds`
    exact              whether the text is, by construction, the same bit for bit with and without drafts
    inexact_because    why not, naming what of the model could depend on the number of tokens in a step
    no_drafts_because  why no step had drafts though they were asked for; None: nothing was in their way
    fallback           why steps were not replayed though graphs were not switched off; None: they were
    rows               of several prompts, what happened on the way of each; the rest is then their sum, and `steps` are
                       steps of a row. Where a forward served several rows, each has the same part of its seconds
    """

    new_tokens: int = 0
    reused_tokens: int = 0
    step_tokens: int = 0
    accepted_histogram: list[int] = field(default_factory=list)
    trace: list[tuple[int, list[int]]] = field(default_factory=list)
    trace_proposers: list[list[int]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    processor_seconds: float = 0.0
    graphed_steps: int = 0
    captures: int = 0
    capture_seconds: float = 0.0
    fused: bool = False
    not_fused_because: str | None = None
    fuse_seconds: float = 0.0
    exact: bool = True
    inexact_because: str | None = None
    no_drafts_because: str | None = None
    fallback: str | None = None
    rows: list[DecodeStats] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a step adds: 1 without drafts. 0 where there was no step."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the prompt's forward included."""
        return self.new_tokens / self.total_seconds if self.new_tokens else 0.0

    @property
    def nodes_per_step(self) -> float:
        """Nodes that a forward checked, the root included: 1 without drafts. 0 where there was no step."""
        return sum(nodes for nodes, _ in self.trace) / self.steps if self.steps else 0.0

    def count_step(self, nodes: int, path: list[int], proposers: list[int]) -> None:
        """Adds a step with a tree of `nodes` nodes that accepted those of `path`, the root left out; see `trace`."""
        accepted, is_open = len(path), nodes > 1
        self.steps += 1
        self.step_tokens += accepted + 1
        self.open_steps += is_open
        self.zero_accept_steps += is_open and accepted == 0
        self.accepted_histogram += [0] * (accepted + 1 - len(self.accepted_histogram))
        self.accepted_histogram[accepted] += 1
        self.trace.append((nodes, path))
        self.trace_proposers.append(proposers)

    def sum_rows(self) -> None:
        """Adds the counts and times of `rows` up, where there are some."""
        if not self.rows:
            return
        for name in ("new_tokens", "reused_tokens", "step_tokens", "steps", "open_steps", "zero_accept_steps",
                     "fuse_seconds", "processor_seconds", "trace", "trace_proposers"):  # fmt: skip
            parts = [getattr(row, name) for row in self.rows]
            setattr(self, name, sum(parts[1:], parts[0]))
        for name in ("not_fused_because", "inexact_because", "no_drafts_because", "fallback"):
            setattr(self, name, next((why for row in self.rows if (why := getattr(row, name))), None))
        self.fused, self.exact = all(row.fused for row in self.rows), all(row.exact for row in self.rows)
        self.seconds = {name: sum(row.seconds[name] for row in self.rows) for name in PHASES}
        longest = max(len(row.accepted_histogram) for row in self.rows)
        padded = [row.accepted_histogram + [0] * (longest - len(row.accepted_histogram)) for row in self.rows]
        self.accepted_histogram = [sum(counts) for counts in zip(*padded, strict=True)]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to seconds[name]."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin


@contextmanager
def shared_phase(texts: Sequence[DecodeStats], name: str) -> Iterator[None]:
    """As `DecodeStats.phase`, of what is done for several texts at once: each takes the same part of the time."""
    begin = time.perf_counter()
    try:
        yield
    finally:
        seconds = (time.perf_counter() - begin) / len(texts)
        for stats in texts:
            stats.seconds[name] += seconds


def stats_of(rows: list[DecodeStats]) -> DecodeStats:
    """Of one text its own; of several what becomes their sum."""
    return rows[0] if len(rows) == 1 else DecodeStats(rows=rows)


@dataclass
class DecodeOutput:
    """sequences (B, S) int64: the prompts and what was generated, as from `generate`; stats: how."""

    sequences: Tensor
    stats: DecodeStats
