"""Which tree and which gate are fastest, from traced texts and step costs.

Everything that is fitted (Platt scaling, thresholds, rates) is fitted on some texts and judged on others: one half of
the questions on the other, and the other way round. What wins is fitted once more, on all texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from ..drafting.static_policy import StaticPolicy
from ..drafting.tree import TreePolicy
from .cost import StepCosts
from .signals import fit_platt
from .trace import TracedText
from .walk import Tally, walk

PLAIN = "plain"  # the name of the setting that never drafts, and its kind
UNGATED = (PLAIN, "dynamic")  # at every step the same number of nodes
KINDS = (*UNGATED, "entropy", "confidence")
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

    def speed(self, name: str) -> float:
        """Tokens a second."""
        return self.tallies[name].tokens_per_second

    def best(self, *kinds: str) -> str | None:
        """The fastest of these kinds; of equals the first, which is the simpler one."""
        names = [name for name, setting in self.settings.items() if setting.kind in kinds]
        return max(names, key=self.speed, default=None)


def mean_context(texts: Sequence[TracedText]) -> float:
    """Tokens before a step, on average."""
    return fmean(text.prompt + place for text in texts for place in range(len(text)))


def fitted_settings(texts: Sequence[TracedText], costs: StepCosts) -> dict[str, Setting]:
    """All candidates, as some texts teach them; their names are the same whatever the texts are.

    Trees of each size at every step; the best of them where the entropy is low; and a gate that chooses how many nodes
    of the largest.
    """
    found = {PLAIN: Setting(PLAIN, StaticPolicy.root(), AlwaysOpen())}
    platt = tuple(fit_platt(texts))
    trees = [DynamicPolicy(size, platt=platt) for size in costs.sizes if size > 1]
    if not trees:
        return found
    rates = [walk(texts, tree, AlwaysOpen(), costs).tokens_per_second for tree in trees]
    best, largest = trees[int(np.argmax(rates))], trees[-1]
    found |= {f"dynamic {tree.size}": Setting("dynamic", tree, AlwaysOpen()) for tree in trees}
    entropies = np.concatenate([text.entropy for text in texts])
    for share in _SHARES:
        threshold = float(np.quantile(entropies, share))
        found[f"entropy at {share:.0%}"] = Setting("entropy", best, EntropyGate(threshold))
    by_size = costs.by_size(mean_context(texts))
    rate = max(rates)
    for _ in range(_ROUNDS):  # the one that the gate reaches with it
        rate = walk(texts, largest, ConfidenceGate(by_size, rate=rate), costs).tokens_per_second
    gates = {f"margin {margin}": ConfidenceGate(by_size, margin) for margin in _MARGINS}
    gates["rate"] = ConfidenceGate(by_size, rate=rate)
    return found | {f"confidence {name}": Setting("confidence", largest, gate) for name, gate in gates.items()}


def halves(texts: Sequence[TracedText]) -> list[tuple[list[TracedText], list[TracedText]]]:
    """(to fit, to judge), both ways. The turns of a question stay together; one question alone is fitted and judged."""
    even = set(sorted({text.question for text in texts})[::2])
    first = [text for text in texts if text.question in even]
    second = [text for text in texts if text.question not in even]
    return [(first, second), (second, first)] if second else [(first, first)]


def choose(texts: Sequence[TracedText], costs: StepCosts) -> Choice:
    """The setting with the most tokens a second; one with a gate only where it gains more than GATE_GAIN."""
    parts = halves(texts)
    learned = [fitted for fitted, _ in parts] + [texts]
    *fitted, final = [fitted_settings(some, costs) for some in tqdm(learned, desc="fitting", unit="part")]
    tallies: dict[str, Tally] = {}
    for name in tqdm(final, desc="trees and gates", unit="setting"):
        folds = [
            walk(judged, settings[name].tree, settings[name].gate, costs)
            for settings, (_, judged) in zip(fitted, parts, strict=True)
        ]
        tallies[name] = sum(folds, Tally())
    ungated = Choice(PLAIN, PLAIN, final, tallies).best(*UNGATED) or PLAIN
    gated = Choice(PLAIN, PLAIN, final, tallies).best(*set(KINDS).difference(UNGATED))
    needed = (1 + GATE_GAIN) * tallies[ungated].tokens_per_second
    chosen = gated if gated and tallies[gated].tokens_per_second > needed else ungated
    return Choice(chosen, ungated, final, tallies)
