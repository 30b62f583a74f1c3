"""What a step costs on this machine, by the size of its tree and the length of the text.

Timed are the steps of `decode` itself, on a cache that is set to the wanted length before each of them. All sizes and
lengths take turns, in rounds, so that a machine that slows down for a while does so for all of them; medians count.
Compiled steps are timed of exactly these sizes: what fills a tree up to one of them is for `walk` to know.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.gate import ConfidenceGate, EntropyGate, Gate, Signals
from ..drafting.static_policy import StaticPolicy
from ..engine.loop import propose
from ..runtime.runtime import runtime_of
from ..runtime.sampling import Sampling
from ..runtime.stats import DecodeStats
from ..runtime.stepper import Drafts, Stepper

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..drafting.heads import CerberusHeads

PASSES = 3  # over everything, each with steppers of its own
# Timed one after the other, behind one that is not: `decode` mostly repeats a size, and the first step after one of
# another size is slower.
_IN_A_ROW = 2
_ASKED = 50  # how often the time of a question that takes microseconds is measured


@dataclass(frozen=True)
class StepCosts:
    """Seconds of whole steps, with everything that `decode` does in one.

    sizes (S,), ascending, the first is 1; contexts (C,), ascending: tokens before the step
    open  (S, C): where the host does not look at the drafts; size 1 is a plain step, without a draft
    asked (S, C): where it does, for a ConfidenceGate or a DynamicPolicy; size 1 is a plain step after having looked
    entropy   asking an EntropyGate, at every step
    spread    the distance of the quartiles, as a share of the median; the median over all that was measured
    compiled  whether it is of compiled steps; compile_seconds: what was waited for them, in none of the times
    """

    sizes: tuple[int, ...]
    contexts: tuple[int, ...]
    open: tuple[tuple[float, ...], ...]
    asked: tuple[tuple[float, ...], ...]
    entropy: float = 0.0
    spread: float = 0.0
    compiled: bool = False
    compile_seconds: float = 0.0
    _lines: dict[tuple[int, bool], list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def seconds(self, size: int, context: int, looked: bool, entropy: bool = False) -> float:
        """Of a step with a tree of `size` nodes, `context` tokens being there.

        looked: the host has looked at the drafts, before it chose the tree. entropy: it has asked for the entropy.
        """
        line = self._lines.setdefault((size, looked), [])
        if context >= len(line):
            line[:] = self._line(size, looked, max(2 * len(line), context + 1, 1024))
        return line[context] + (self.entropy if entropy else 0.0)

    def by_size(self, context: float, asked: bool) -> dict[int, float]:
        """size -> seconds"""
        table = self.asked if asked else self.open
        return {size: float(self._at([context], row)[0]) for size, row in zip(self.sizes, table, strict=True)}

    def _line(self, size: int, asked: bool, length: int) -> list[float]:
        """Seconds at 0, 1, ... length - 1 tokens."""
        table = np.array(self.asked if asked else self.open)  # (S, C)
        row = [float(np.interp(size, self.sizes, column)) for column in table.T]
        return self._at(np.arange(length), row).tolist()

    def _at(self, contexts: Any, row: Sequence[float]) -> np.ndarray:
        """Straight lines between what was measured; beyond, the last one goes on, and never falls."""
        found = np.interp(contexts, self.contexts, row)
        if len(row) > 1:
            slope = max(0.0, (row[-1] - row[-2]) / (self.contexts[-1] - self.contexts[-2]))
            found = found + slope * np.clip(np.asarray(contexts) - self.contexts[-1], 0, None)
        return found


class _Answering(ConfidenceGate):
    """Computes what a ConfidenceGate does, and gives the answer that is to be timed."""

    answer: int = 0

    def decide(self, signals: Signals) -> int:
        super().decide(signals)
        return self.answer


def measure_costs(
    model: PreTrainedModel,
    heads: CerberusHeads,
    trees: Mapping[int, StaticPolicy],
    contexts: Sequence[int],
    rounds: int,
    compiled: bool = False,
) -> StepCosts:
    """trees: by size, those that are to be timed, size 1 among them. rounds: in each of PASSES passes.

    compiled: of compiled steps. Raises CompileError where there are none.
    """
    sizes, contexts = sorted(trees), sorted(contexts)
    samples: dict[tuple[bool, int, int], list[float]] = {
        (asked, size, context): [] for asked in (False, True) for size in sizes for context in contexts
    }
    entropy: list[float] = []
    grown = [tree for tree in trees.values() if tree.size > 1]
    choosing = _Answering({1: 1.0, max(sizes): 2.0}, rate=1.0)
    capacity = max(contexts) + 1 + max(sizes)
    drafts = max(tree.useful_drafts for tree in trees.values())
    kinds = (False, True) if grown else (False,)
    compile_seconds = 0.0
    with tqdm(total=PASSES * len(kinds) * (rounds + 1), desc="step costs", unit="round") as bar:
        for _ in range(PASSES):
            for asked in kinds:
                gate: Gate = choosing if asked else Gate()
                stats, how = DecodeStats(), Drafts(heads, drafts, asked, tuple(sizes))
                steps = runtime_of(model).steps(how, Sampling(), stats, capacity, compile=compiled)
                with torch.inference_mode(), steps as stepper:
                    _fill(stepper, model)
                    for number in range(rounds + 1):  # the first one warms up, and compiles
                        for (kind, size, context), times in samples.items():
                            if kind is not asked:
                                continue
                            choosing.answer = size
                            row = [
                                _time_step(stepper, gate, trees[size if size > 1 or not asked else max(sizes)], context)
                                for _ in range(1 + _IN_A_ROW)
                            ]
                            if number:
                                times += row[1:]
                        bar.update()
                    if not asked:
                        entropy += _time_entropy(stepper)
                compile_seconds += stats.compile_seconds

    def typical(asked: bool, size: int, context: int) -> float:
        found = median(samples[False, size, context])
        # A gate that looks does strictly more: where it seems to take less time, that is the noise of the machine.
        return max(found, median(samples[True, size, context])) if asked and grown else found

    def table(asked: bool) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(typical(asked, size, context) for context in contexts) for size in sizes)

    spread = median(_spread(times) for times in samples.values() if times)
    return StepCosts(
        tuple(sizes), tuple(contexts), table(False), table(True), median(entropy), spread, compiled, compile_seconds
    )


def _fill(stepper: Stepper, model: PreTrainedModel) -> None:
    """A short prompt, and numbers in the whole cache: memory that was never written may be faster to read."""
    embeddings: Any = model.get_input_embeddings().weight
    stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=embeddings.device))
    cache = stepper.base.cache.tensor
    assert cache is not None  # the prompt has filled it
    cache.normal_()


def _time_step(stepper: Stepper, gate: Gate, tree: StaticPolicy, context: int) -> float:
    """Seconds of one step after `context` tokens."""
    cache = stepper.base.cache
    cache.length.fill_(context)
    cache.committed = context
    if cache.length.is_cuda:
        torch.cuda.synchronize(cache.length.device)
    begin = time.perf_counter()
    stepper.step(propose(stepper, tree, gate, tree, stepper.max_depth()))
    return time.perf_counter() - begin


def _time_entropy(stepper: Stepper) -> list[float]:
    gate, chain, times = EntropyGate(0.0), StaticPolicy.chain(1), []
    for _ in range(_ASKED):
        begin = time.perf_counter()
        propose(stepper, chain, gate, chain, 1)
        times.append(time.perf_counter() - begin)
    return times


def _spread(times: Sequence[float]) -> float:
    low, middle, high = np.quantile(times, [0.25, 0.5, 0.75])
    return float((high - low) / middle)
