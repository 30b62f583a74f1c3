"""What a step costs on this machine, by the size of its tree and the length of the text.

Timed are the steps of `decode` itself, on a cache that is set to the wanted length before each of them. All sizes and
lengths take turns, in rounds, so that a machine that slows down for a while does so for all of them; medians count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysClosed, ConfidenceGate, EntropyGate, Gate, Signals
from ..drafting.heads import CerberusHeads, input_matrix
from ..drafting.suffix import SuffixProposer
from ..drafting.tree import Trees
from ..engine.loop import propose
from ..engine.plan import asked_drafts
from ..evaluation.timing import timed
from ..runtime.runtime import runtime_of
from ..runtime.sampling import Sampling
from ..runtime.session import steps
from ..runtime.stats import DecodeStats
from ..runtime.stepper import Drafts, Stepper

PASSES = 3  # over everything, each with steppers of its own
# Timed one after the other, behind one that is not: `decode` mostly repeats a size, and the first step after one of
# another size is slower.
_IN_A_ROW = 2
_ASKED = 50  # how often the time of a question that takes microseconds is measured


@dataclass(frozen=True)
class StepCosts:
    """Seconds of whole steps, with everything that `decode` does in one.

    sizes (S,), ascending, the first is 1; contexts (C,), ascending: tokens before the step
    plain  (C,): of a step without drafts, the host not having looked at any
    looked (S, C): of steps where the host has looked at the drafts, for a tree or a gate; size 1 is a step without
           drafts after having looked
    entropy  of asking an EntropyGate, at every step
    spread   the distance of the quartiles, as a share of the median; the median over all that was measured
    """

    sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    plain: tuple[float, ...]
    looked: tuple[tuple[float, ...], ...]
    entropy: float = 0.0
    spread: float = 0.0
    _lines: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, size: int, context: int, looked: bool, entropy: bool = False) -> float:
        """Of a step with a tree of `size` nodes, `context` tokens being there.

        looked: the host has looked at the drafts; else size is 1. entropy: it has asked for the entropy.
        """
        line = self._lines.setdefault(size if looked else 0, [])
        if context >= len(line):
            table = np.array(self.looked)
            row = [float(np.interp(size, self.sizes, column)) for column in table.T] if looked else self.plain
            line[:] = self._at(np.arange(max(2 * len(line), context + 1, 1024)), row).tolist()
        return line[context] + (self.entropy if entropy else 0.0)

    def by_size(self, context: float) -> dict[int, float]:
        """size -> seconds after having looked"""
        return {size: float(self._at(context, row)) for size, row in zip(self.sizes, self.looked, strict=True)}

    def plain_at(self, context: float) -> float:
        return float(self._at(context, self.plain))

    def _at(self, contexts: Any, row: Sequence[float]) -> np.ndarray:
        """Straight lines between what was measured; beyond, the last one goes on, and never falls."""
        found = np.interp(contexts, self.contexts, row)
        if len(row) > 1:
            slope = max(0.0, (row[-1] - row[-2]) / (self.contexts[-1] - self.contexts[-2]))
            found = found + slope * np.clip(np.asarray(contexts) - self.contexts[-1], 0, None)
        return found


class _Answering(ConfidenceGate):
    """Computes what a ConfidenceGate does, and gives the answer that is to be timed."""

    answer = 0

    def decide(self, signals: Signals) -> int:
        super().decide(signals)
        return self.answer


def measure_costs(
    model: PreTrainedModel,
    heads: CerberusHeads,
    sizes: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
) -> StepCosts:
    """sizes: of the trees to time, 1 among them, ascending; contexts, ascending. rounds: in each of PASSES passes."""
    policy, runtime = DynamicPolicy(max(2, *sizes)), runtime_of(model)
    choosing, closed = _Answering({1: 1.0, policy.size: 2.0}, rate=1.0), EntropyGate(float("-inf"))
    vocabulary = input_matrix(model).shape[0]
    # With a text that was said before, so that there are always as many drafts as a tree may have.
    text = [token % vocabulary for token in range(policy.size)] * 2
    trees = policy.begin([SuffixProposer()(text)], vocabulary)
    drafts = asked_drafts(heads, policy, vocabulary)
    plain: dict[int, list[float]] = {context: [] for context in contexts}
    looked: dict[tuple[int, int], list[float]] = {(size, context): [] for size in sizes for context in contexts}
    entropy: list[float] = []
    with tqdm(total=2 * PASSES * (rounds + 1), desc="step costs", unit="round") as bar:
        for number in range(2 * PASSES):
            looks, stats = bool(number % 2), DecodeStats()
            how = Drafts(heads, *drafts, looks, tuple(sizes) if looks else (1,))
            cells = [(times, size, context) for (size, context), times in looked.items()] if looks else [
                (times, 1, context) for context, times in plain.items()
            ]  # fmt: skip
            made = steps(runtime, how, Sampling(), stats, max(contexts) + 1 + policy.size)
            with torch.inference_mode(), made as stepper:
                fill(stepper)
                for round in range(rounds + 1):  # the first one warms up
                    for times, size, context in cells:
                        choosing.answer = size
                        gate = choosing if looks else AlwaysClosed()
                        row = [_time_step(stepper, gate, policy, trees, context) for _ in range(1 + _IN_A_ROW)]
                        times += row[1:] if round else []
                    bar.update()
                if not looks:
                    ask = partial(propose, stepper, policy, closed, trees, 1)
                    entropy += [timed(ask, model.device)[1] for _ in range(_ASKED)]
    typical = {context: median(times) for context, times in plain.items()}
    # Having looked is strictly more: where it seems to take less time, that is the noise of the machine.
    table = [[max(typical[context], median(looked[size, context])) for context in contexts] for size in sizes]
    return StepCosts(
        sizes=tuple(sizes),
        contexts=tuple(contexts),
        plain=tuple(typical.values()),
        looked=tuple(map(tuple, table)),
        entropy=median(entropy),
        spread=median(_spread(times) for times in (*plain.values(), *looked.values())),
    )


def fill(stepper: Stepper) -> None:
    """A short prompt, and numbers in the whole cache: memory that was never written may be faster to read."""
    cache = stepper.target.cache
    stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=cache.length.device))
    assert cache.tensor is not None  # the prompt has filled it
    cache.tensor.normal_()


def put_back(stepper: Stepper, context: int) -> None:
    """To where its text has `context` tokens."""
    cache = stepper.target.cache
    cache.length.fill_(context)
    cache.committed = context


def _time_step(stepper: Stepper, gate: Gate, policy: DynamicPolicy, trees: Trees, context: int) -> float:
    """Seconds of one step after `context` tokens."""
    put_back(stepper, context)

    def step() -> Any:
        return stepper.step(propose(stepper, policy, gate, trees, stepper.max_depth()))

    return timed(step, stepper.target.cache.length.device)[1]


def _spread(times: Sequence[float]) -> float:
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float((high - low) / middle)
