"""What calibration says: plain numbers for JSON, and the same as lines of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen
from ..drafting.platt import PlattScaling
from ..drafting.tree import TreePolicy
from ..engine.calibration_store import Calibration
from .choice import KINDS, UNGATED, Choice, halves, mean_context
from .cost import StepCosts
from .signals import auc, by_quantile, fit_platt, head_reliability
from .trace import TracedText
from .validate import GateGain, Measured
from .walk import accepted_lengths, walk


def signal_rows(texts: Sequence[TracedText], policy: TreePolicy) -> list[dict[str, Any]]:
    """Every signal of a gate against the length that a step with a tree of the heads accepts, at all places.

    auc: of the signal for "at least one draft is accepted"; of an entropy, that a low one says so. None where all
    places are alike.
    """
    lengths = [length for text in texts for length in accepted_lengths(text, policy)]
    best = torch.cat([text.logprobs[:, 0] for text in texts]).double().exp()  # (places, P) of head 1
    # A higher signal should mean more accepted drafts; an entropy is meant the other way round.
    signals: list[tuple[str, str, int, Sequence[float]]] = [
        ("entropy of softmax(h)", "nats", -1, [value for text in texts for value in text.entropy]),
        ("entropy of the next token", "nats", -1, [value for text in texts for value in text.next_entropy]),
        ("head 1's best draft", "probability", 1, best[:, 0].tolist()),
        ("head 1's three best drafts", "probability", 1, best[:, :3].sum(-1).tolist()),
    ]
    rows = []
    for name, unit, sign, values in signals:
        mean, accepted = by_quantile(values, lengths)
        area = auc(sign * np.array(values), np.array(lengths) > 0)
        rows.append(
            {"name": name, "unit": unit, "auc": None if math.isnan(area) else area, "mean": mean, "accepted": accepted}
        )
    return rows


def reliability_rows(judged: Sequence[TracedText], taught: PlattScaling) -> list[dict[str, Any]]:
    """Per head: its best draft's probability as drafted, and corrected by what other texts taught."""
    both = zip(head_reliability(judged, None), head_reliability(judged, taught), strict=True)
    names = ("probability", "share", "error")
    return [
        {"drafted": dict(zip(names, drafted, strict=True)), "corrected": dict(zip(names, corrected, strict=True))}
        for drafted, corrected in both
    ]


def expectation_rows(judged: Sequence[TracedText], taught: PlattScaling, costs: StepCosts) -> dict[str, dict[str, Any]]:
    """What steps are expected to add against what they add, as drafted, and corrected by what other texts taught: means
    over all steps, and over tenths of them. Empty where there are no trees."""
    rows: dict[str, dict[str, Any]] = {}
    for name, platt in (("drafted", None), ("corrected", tuple(taught))):
        policy = DynamicPolicy(max(2, *costs.sizes), platt=platt)
        steps = np.array(walk(judged, policy, AlwaysOpen(), costs).expected, dtype=np.float64).reshape(-1, 2)
        if len(steps):
            expected, added = by_quantile(steps[:, 0], steps[:, 1])
            mean = steps.mean(0).tolist()
            rows[name] = {"mean_expected": mean[0], "mean_added": mean[1], "expected": expected, "added": added}
    return rows


def details(
    texts: Sequence[TracedText],
    choice: Choice,
    costs: StepCosts,
    measured: Mapping[str, Measured],
    gain: GateGain | None,
) -> dict[str, Any]:
    """measured: by the clock, by name of the setting; gain: of the gate that was expected to be the fastest."""
    fitted, judged = halves(texts)[0]
    taught, context = fit_platt(fitted), mean_context(texts)
    seconds = costs.by_size(context) | {1: costs.plain_at(context)}
    best_tree = choice.best("dynamic")
    signals_of = DynamicPolicy(2) if best_tree is None else choice.settings[best_tree].tree
    rates = {kind: name for kind in KINDS if (name := choice.best(kind)) is not None}
    return {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "mean_context": context,
        "agreeing": fmean(text.agreeing for text in texts),
        "costs": {name: getattr(costs, name) for name in ("contexts", "sizes", "plain", "looked", "entropy", "spread")},
        "sizes": [
            {"size": setting.tree.size, "step_seconds": seconds[setting.tree.size], **speeds(choice, name)}
            for name, setting in choice.settings.items()
            if setting.kind in UNGATED
        ],
        "gates": {
            kind: {"name": name, **speeds(choice, name), "gate_open_rate": choice.tallies[name].gate_open_rate}
            for kind, name in rates.items()
        },
        "chosen": choice.chosen,
        "signals_of_tree": signals_of.size,
        "signals": signal_rows(texts, signals_of),
        "reliability": reliability_rows(judged, taught),
        "expectations": expectation_rows(judged, taught, costs),
        "validation": {name: one.row() for name, one in measured.items()},
        "gate_gain": None if gain is None else asdict(gain),
    }


def speeds(choice: Choice, name: str) -> dict[str, float]:
    tally = choice.tallies[name]
    return {"tokens_per_step": tally.tokens_per_step, "tokens_per_second": tally.tokens_per_second}


def lines(calibration: Calibration) -> Iterator[str]:
    """Tables for a terminal."""
    found, expected = calibration.details, calibration.expected
    threads = f", {calibration.threads} threads" if calibration.threads else ""
    texts = f"{found['texts']} texts, {found['tokens']} tokens, mean context {found['mean_context']:.0f}"
    yield f"{calibration.device}, {calibration.dtype}{threads}; {texts}"
    yield from ("", "nodes  ms a step  tokens a step  tokens/s")
    for row in found["sizes"]:
        step = f"{row['size']:5}  {1000 * row['step_seconds']:9.2f}  {row['tokens_per_step']:13.3f}"
        yield f"{step}  {row['tokens_per_second']:8.1f}"
    yield from ("", "kind        tokens/s  tokens a step   open  setting")
    for kind, row in found["gates"].items():
        speed = f"{kind:10}  {row['tokens_per_second']:8.1f}  {row['tokens_per_step']:13.3f}"
        yield f"{speed}  {100 * row['gate_open_rate']:4.0f} %  {row['name']}"
    yield from ("", "signal                       AUC for at least one accepted draft")
    for row in found["signals"]:
        yield f"{row['name']:27}  {'none' if row['auc'] is None else format(row['auc'], '.3f')}"
    errors = (
        f"head {number}: {head['drafted']['error']:.3f} -> {head['corrected']['error']:.3f}"
        for number, head in enumerate(found["reliability"], start=1)
    )
    yield from ("", f"calibration error of the best draft, as drafted -> corrected: {', '.join(errors)}")
    for name, row in found["expectations"].items():
        yield (
            f"tokens a step with {found['costs']['sizes'][-1]} nodes, {name}: expected {row['mean_expected']:.2f},"
            f" added {row['mean_added']:.2f}"
        )
    yield from validation_lines(found)
    pace = " at the pace of both step times and validation" if found["validation"] else ""
    yield ""
    yield (
        f"chosen: {found['chosen']}; expected: {expected.tokens_per_second:.1f} tokens/s{pace},"
        f" {expected.tokens_per_step:.2f} tokens a step, {expected.speed_up:.2f}x plain decoding"
        f" ({expected.plain_tokens_per_second:.1f} tokens/s); step times vary by {100 * found['costs']['spread']:.0f} %"
    )


def validation_lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["validation"]:
        width = max(len(name) for name in [*found["validation"], "validation"])
        yield from ("", f"{'validation':{width}}  predicted tokens/s  measured  predicted steps  measured")
        for name, row in found["validation"].items():
            speed = f"{row['predicted_tokens_per_second']:18.1f}  {row['tokens_per_second']:8.1f}"
            other = "" if row["same_texts"] else "  (other texts: near ties)"
            yield f"{name:{width}}  {speed}  {row['predicted_steps']:15}  {row['steps']:8}{other}"
    if gain := found["gate_gain"]:
        between = "" if gain["interval"] is None else " ({:.3f} - {:.3f})".format(*gain["interval"])
        clock = f"by the clock {gain['measured']:.3f}x{between}"
        yield f"gate over the best tree without one: foreseen {gain['foreseen']:.3f}x, {clock}"
