"""The prediction against the clock: some of the texts are decoded once more, in the ways that are to be compared.

A machine is never so quiet that the seconds of a few texts could tell settings apart which differ by some percent. So
the ways take turns on every text, and what counts is by how much more or less than foreseen one of them gains over the
other on the same texts: whether drafts are right there more often than elsewhere is foreseen, too, and drops out.

The machine's pace drifts, by a fifth within minutes, and two samples of it are better than one: what is expected of a
setting in the end is what the walk says of all texts, at a pace midway between that of the step times and that at which
these texts were decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from ..drafting.heads import CerberusHeads
from ..engine.decode import decode
from ..evaluation.bootstrap import bootstrap_interval, ratio_of_totals
from ..evaluation.timing import rotated
from ..runtime.stats import DecodeOutput
from .choice import PLAIN, Choice, Setting
from .cost import StepCosts
from .trace import Answer, TracedText, trace
from .walk import walk

_WARM_UP = 16  # tokens


@dataclass
class Measured:
    """What decoding some texts with a setting came to. predicted: what the walk says of the same texts.

    seconds, predicted_seconds: of the steps, without the prompt, by number of the text
    same_texts: whether they are those that the choice was made with, and did not part from them at near ties
    """

    seconds: dict[int, float] = field(default_factory=dict)
    predicted_seconds: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    predicted_tokens: int = 0
    steps: int = 0
    predicted_steps: int = 0
    same_texts: bool = True

    @property
    def pace(self) -> float:
        """By what a prediction is to be multiplied, to be midway between the step times' pace and the clock's."""
        row = self.row()
        return float((row["tokens_per_second"] / row["predicted_tokens_per_second"]) ** 0.5)

    def row(self) -> dict[str, Any]:
        """For the report. Speeds in tokens a second, without the prompt."""
        return {
            "texts": len(self.seconds),
            "predicted_steps": self.predicted_steps,
            "steps": self.steps,
            "predicted_tokens_per_second": self.predicted_tokens / sum(self.predicted_seconds.values()),
            "tokens_per_second": self.tokens / sum(self.seconds.values()),
            "same_texts": self.same_texts,
        }


@dataclass(frozen=True)
class GateGain:
    """How many times as fast a gate makes decoding as the best tree alone.

    foreseen: on all texts. measured: that, as the clock corrects it. interval: in which the measured one lies with 95 %
    certainty; None: too few texts to tell.
    """

    foreseen: float
    measured: float
    interval: tuple[float, float] | None

    @property
    def slower(self) -> bool:
        """Whether the gate is slower beyond what noise explains."""
        return self.interval is not None and self.interval[1] < 1


def validate(
    model: PreTrainedModel,
    heads: CerberusHeads,
    texts: Sequence[tuple[Answer, TracedText]],
    settings: Mapping[str, Setting],
    costs: StepCosts,
) -> dict[str, Measured]:
    """settings: by name, run in turns on every text, each time another one first. Plain decoding,
    which takes longest and is mostly compared with nothing, has every other text only.
    The first text is decoded once before, to warm up."""
    names = list(settings)
    options: dict[str, dict[str, Any]] = {name: {"tree": one.tree, "gate": one.gate} for name, one in settings.items()}
    rounds = [(name, number) for number in range(len(texts)) for name in rotated(names, number)
              if name != PLAIN or number % 2 == 0]  # fmt: skip
    found = {name: Measured() for name in names}
    others: dict[int, tuple[Answer, TracedText]] = {}

    def decoded(name: str, answer: Answer, new_tokens: int) -> DecodeOutput:
        return decode(model, heads, answer.ids[:, : answer.prompt], max_new_tokens=new_tokens, **options[name])

    with tqdm(total=len(names) + len(rounds), desc="validation", unit="text") as bar:
        for name in names:
            decoded(name, texts[0][0], min(texts[0][0].most, _WARM_UP))
            bar.update()
        for name, number in rounds:
            (answer, text), setting, measured = others.get(number, texts[number]), settings[name], found[name]
            out = decoded(name, answer, answer.most)
            if out.stats.new_tokens > 1 and not out.sequences.equal(answer.ids):
                # On a GPU, steps of other sizes round differently: what is predicted is to be of the same text.
                other = replace(answer, ids=out.sequences)
                others[number] = other, trace(model, heads, other)
                text = others[number][1]
            tally = walk([text], setting.tree, setting.gate, costs)
            measured.seconds[number] = out.stats.total_seconds - out.stats.seconds["prefill"]
            measured.predicted_seconds[number] = tally.seconds
            measured.tokens += out.stats.new_tokens - 1  # the first one came with the prompt
            measured.predicted_tokens += tally.tokens
            measured.steps += out.stats.steps
            measured.predicted_steps += tally.steps
            measured.same_texts = measured.same_texts and out.sequences.equal(texts[number][0].ids)
            bar.update()
    return found


def gate_gain(choice: Choice, measured: Mapping[str, Measured]) -> GateGain | None:
    """Of the chosen setting over the best one without a gate; None where that is what was chosen."""
    if choice.chosen == choice.best_ungated or not measured:
        return None
    gated, alone = measured[choice.chosen], measured[choice.best_ungated]
    foreseen = choice.speed(choice.chosen) / choice.speed(choice.best_ungated)
    both = [number for number in gated.seconds if number in alone.seconds]  # plain decoding has fewer
    parts = (alone.seconds, gated.seconds, alone.predicted_seconds, gated.predicted_seconds)
    rows = np.array([[part[number] for part in parts] for number in both])  # (texts, 4)
    interval = bootstrap_interval(ratio_of_totals, rows)
    return GateGain(
        foreseen,
        foreseen * float(ratio_of_totals(rows)),
        None if interval is None else (foreseen * interval[0], foreseen * interval[1]),
    )
