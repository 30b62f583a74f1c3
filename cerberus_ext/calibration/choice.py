"""Which tree and which gate are fastest, from traced texts and step costs.

Everything that is fitted (trees, thresholds, platt, rates) is fitted on some texts and judged on others: one half
of the questions on the other, and the other way round. What wins is fitted once more, on all texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from ..drafting.simulate import best_paths
from ..drafting.static_policy import StaticPolicy
from ..drafting.tree import TreePolicy
from .cost import StepCosts
from .signals import fit_platt
from .trace import TracedText
from .walk import Tally, walk

PLAIN = "open 1"  # the name of the setting that never drafts
UNGATED = ("open", "dynamic")  # one tree of the heads at every step; the step's own, with the text's past
KINDS = ("open", "entropy", "confidence", "dynamic", "dynamic gate")
GATE_GAIN = 0.01  # by so much a gate has to be faster than the best tree alone
_SHARES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # of the places, at which an EntropyGate opens
_MARGINS = (0.0, 0.1)
_ROUNDS = 3  # until gate and rate agree


@dataclass(frozen=True)
class Setting:
    """What `decode` may run with. kind: one of KINDS."""

    kind: str
    tree: TreePolicy
    gate: Gate


@dataclass(frozen=True)
class Choice:
    """chosen, best_ungated: names of settings; settings: all of them, fitted on all texts; tallies: as judged."""

    chosen: str
    best_ungated: str
    settings: Mapping[str, Setting]
    tallies: Mapping[str, Tally]

    def best(self, kind: str) -> str | None:
        return _best(self.tallies, [name for name, setting in self.settings.items() if setting.kind == kind])


class Fit:
    """What some texts teach."""

    def __init__(self, texts: Sequence[TracedText], sizes: Sequence[int]) -> None:
        self.texts, self.sizes = texts, sizes

    @cached_property
    def trees(self) -> dict[int, StaticPolicy]:
        """By size; the best one of each that is asked for, as far as the texts know so many right paths."""
        return self._trees(self._rows)

    @cached_property
    def _rows(self) -> list[list[int]]:
        return [row for text in self.texts for row in text.ranks]

    def _trees(self, rows: Sequence[Sequence[int]]) -> dict[int, StaticPolicy]:
        paths = best_paths(rows, max(self.sizes) - 1, self.texts[0].logprobs.shape[2])
        trees = (StaticPolicy.from_paths(paths[: size - 1]) for size in sorted(self.sizes))
        return {1: StaticPolicy.root()} | {tree.size: tree for tree in trees}

    @cached_property
    def platt(self) -> list[tuple[float, float]]:
        logprobs = torch.cat([text.logprobs for text in self.texts]).numpy()
        return fit_platt(logprobs, self._rows)

    def settings(self, costs: StepCosts) -> dict[str, Setting]:
        """All candidates; their names are the same whatever the texts are, where as many trees are known."""
        found = {f"open {size}": Setting("open", tree, AlwaysOpen()) for size, tree in self.trees.items()}
        alone = {name: walk(self.texts, one.tree, one.gate, costs) for name, one in found.items()}
        best = found[_best(alone, list(alone)) or PLAIN].tree
        grown = [tree for tree in self.trees.values() if tree.size > 1]
        entropies = np.array([value for text in self.texts for value in text.entropy])
        for tree in grown:
            for share in _SHARES:
                opens = EntropyGate(float(np.quantile(entropies, share)))
                found[f"entropy {tree.size} at {share}"] = Setting("entropy", tree, opens)
        found |= self._dynamic(costs)
        if not grown:
            return found
        widest = best if best.size > 1 else grown[0]
        by_size = costs.by_size(self._context, asked=True)
        base_rate = max(tally.tokens_per_second for tally in alone.values())
        common: dict[str, Any] = {"costs": by_size}
        for margin in _MARGINS:
            gate = ConfidenceGate(margin=margin, **common)
            found[f"confidence margin {margin}"] = Setting("confidence", widest, gate)
        gate = self._rated(widest, base_rate, costs, common)
        found["confidence rate"] = Setting("confidence", widest, gate)
        return found

    def _dynamic(self, costs: StepCosts) -> dict[str, Setting]:
        """Trees of every step's own drafts: of each size, and a gate that chooses how many nodes of the largest."""
        platt = tuple(self.platt)
        trees = [DynamicPolicy(size, platt=platt) for size in costs.sizes if size > 1]
        if not trees:
            return {}
        found = {f"dynamic {tree.size}": Setting("dynamic", tree, AlwaysOpen()) for tree in trees}
        rate = max(walk(self.texts, tree, AlwaysOpen(), costs).tokens_per_second for tree in trees)
        by_size = costs.by_size(self._context, asked=True)
        if costs.compiled:  # a step of another size would be filled up to the next of these
            by_size = {size: by_size[size] for size in sorted({*trees[-1].sizes} & set(by_size))}
        common: dict[str, Any] = {"costs": by_size}
        gates = {f"margin {margin}": ConfidenceGate(margin=margin, **common) for margin in _MARGINS}
        gates["rate"] = self._rated(trees[-1], rate, costs, common)
        return found | {
            f"dynamic gate {name}": Setting("dynamic gate", trees[-1], gate) for name, gate in gates.items()
        }

    def _rated(self, tree: TreePolicy, rate: float, costs: StepCosts, common: dict[str, Any]) -> ConfidenceGate:
        """A gate whose rate is the one that it reaches. rate: to begin with."""
        for _ in range(_ROUNDS):
            rate = walk(self.texts, tree, ConfidenceGate(rate=rate, **common), costs).tokens_per_second
        return ConfidenceGate(rate=rate, **common)

    @cached_property
    def _context(self) -> float:
        """Tokens before a step, on average."""
        return fmean(text.prompt + place for text in self.texts for place in range(len(text)))


def halves(texts: Sequence[TracedText]) -> list[tuple[list[TracedText], list[TracedText]]]:
    """(to fit, to judge), both ways. The turns of a question stay together; one question alone is fitted and judged."""
    numbers = sorted({text.question for text in texts})
    even = set(numbers[::2])
    first = [text for text in texts if text.question in even]
    second = [text for text in texts if text.question not in even]
    return [(first, second), (second, first)] if second else [(first, first)]


def choose(texts: Sequence[TracedText], sizes: Sequence[int], costs: StepCosts) -> Choice:
    """The setting with the most tokens a second; one with a gate only where it gains more than GATE_GAIN."""
    parts = halves(texts)
    fits = [Fit(one, sizes) for one in (*(fitted for fitted, _ in parts), texts)]
    *fitted, final = [fit.settings(costs) for fit in tqdm(fits, desc="fitting", unit="part")]
    folds = [(settings, judged) for settings, (_, judged) in zip(fitted, parts, strict=True)]
    names = [name for name in final if all(name in settings for settings, _ in folds)]
    tallies: dict[str, Tally] = {}
    for name in tqdm(names, desc="trees and gates", unit="setting"):
        tallies[name] = Tally()
        for settings, judged in folds:
            tallies[name] += walk(judged, settings[name].tree, settings[name].gate, costs)
    chosen = best_ungated = _best(tallies, [name for name in names if final[name].kind in UNGATED])
    gated = _best(tallies, [name for name in names if final[name].kind not in UNGATED])
    assert best_ungated is not None and chosen is not None  # PLAIN is always there
    if gated and tallies[gated].tokens_per_second > (1 + GATE_GAIN) * tallies[best_ungated].tokens_per_second:
        chosen = gated
    return Choice(chosen, best_ungated, {name: final[name] for name in names}, tallies)


def _best(tallies: Mapping[str, Tally], names: Sequence[str]) -> str | None:
    """The fastest; of equals the first, which is the simpler one."""
    return max(names, key=lambda name: tallies[name].tokens_per_second, default=None)
