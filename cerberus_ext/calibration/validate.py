"""The prediction against the clock: a few of the texts are decoded once more, in the ways that are to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm  # type: ignore[import-untyped]

from ..compile_ahead import compile_ahead
from ..decode import decode
from .choice import Setting
from .cost import StepCosts
from .trace import Answer, TracedText
from .walk import walk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..heads import CerberusHeads


_WARM_UP = 16  # tokens


@dataclass
class Measured:
    """predicted_*: what the walk says of the same texts. steps; tokens a second of the steps, without the prompt."""

    predicted_steps: int
    steps: int
    predicted_tokens_per_second: float
    tokens_per_second: float
    same_texts: bool


def validate(
    model: PreTrainedModel,
    heads: CerberusHeads,
    texts: Sequence[tuple[Answer, TracedText]],
    settings: Mapping[str, Setting],
    costs: StepCosts,
) -> dict[str, Measured]:
    """settings: by name, run in turns on every text, compiled where the costs are of compiled steps. The first text is
    decoded once before, to warm up."""
    if costs.compiled:
        for setting in settings.values():
            compile_ahead(model, heads, tree=setting.tree, gate=setting.gate)
    seconds, steps = dict.fromkeys(settings, 0.0), dict.fromkeys(settings, 0)
    same = dict.fromkeys(settings, True)
    with tqdm(total=len(settings) * (len(texts) + 1), desc="validation", unit="text") as bar:
        for number, (answer, _) in enumerate([texts[0], *texts]):
            for name, setting in settings.items():
                ids = answer.ids[:, : answer.prompt]
                new = answer.most if number else min(answer.most, _WARM_UP)
                out = decode(
                    model,
                    heads,
                    ids,
                    max_new_tokens=new,
                    tree=setting.tree,
                    gate=setting.gate,
                    compile=costs.compiled,
                )
                if number:
                    seconds[name] += out.stats.total_seconds - out.stats.seconds["prefill"]
                    steps[name] += out.stats.steps
                    same[name] = same[name] and out.sequences.equal(answer.ids)
                bar.update()
    tokens = sum(answer.new - 1 for answer, _ in texts)
    results = {}
    for name, setting in settings.items():
        tally = walk([text for _, text in texts], setting.tree, setting.gate, costs)
        speed = tokens / seconds[name]
        results[name] = Measured(tally.steps, steps[name], tally.tokens_per_second, speed, same[name])
    return results
