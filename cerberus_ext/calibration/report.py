"""What calibration says: plain numbers for JSON, and the same as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import numpy as np
import torch

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen
from ..drafting.platt import PlattScaling
from ..drafting.static_policy import StaticPolicy
from ..engine.calibration_store import Calibration
from .choice import KINDS, PLAIN, UNGATED, Choice, Fit, halves
from .cost import StepCosts
from .signals import auc, by_quantile, head_reliability
from .trace import TracedText
from .validate import GateGain, Measured
from .walk import walk


def signal_rows(texts: Sequence[TracedText], tree: StaticPolicy) -> list[dict[str, Any]]:
    """Every signal of a gate against the length that a step with `tree` accepts, at all places of the texts.

    auc: of the signal for "at least one draft is accepted"; of an entropy, that a low one says so. None where all
    places are alike.
    """
    lengths = [length for text in texts for length in text.accepted(tree)]
    best = torch.cat([text.logprobs[:, 0] for text in texts]).double().exp()  # (places, P) of head 1
    # A higher signal should mean more accepted drafts; an entropy is meant the other way round.
    signals = [
        ("entropy of softmax(h)", "nats", -1, [value for text in texts for value in text.entropy]),
        ("entropy of the next token", "nats", -1, [value for text in texts for value in text.next_entropy]),
        ("head 1's best draft", "probability", 1, best[:, 0].tolist()),
        ("head 1's three best drafts", "probability", 1, best[:, :3].sum(-1).tolist()),
    ]
    rows = []
    for name, unit, sign, values in signals:
        mean, accepted = by_quantile(values, lengths)
        area = auc([sign * value for value in values], [length > 0 for length in lengths])
        rows.append(
            {"name": name, "unit": unit, "auc": None if math.isnan(area) else area, "mean": mean, "accepted": accepted}
        )
    return rows


def reliability_rows(judged: Sequence[TracedText], taught: PlattScaling) -> list[dict[str, Any]]:
    """Per head: its best draft' probability as drafted, and corrected by what other texts taught."""
    logprobs = torch.cat([text.logprobs for text in judged]).numpy()
    ranks = [row for text in judged for row in text.ranks]
    rows: list[dict[str, Any]] = [{} for _ in ranks[0]]
    for name, platt in (("drafted", None), ("corrected", taught)):
        for row, (mean, share, error) in zip(rows, head_reliability(logprobs, ranks, platt), strict=True):
            row[name] = {"probability": mean, "share": share, "error": error}
    return rows


def promise_rows(judged: Sequence[TracedText], taught: PlattScaling, costs: StepCosts) -> dict[str, dict[str, Any]]:
    """What steps with trees of their own promise to gain against what they gain, as drafted, and corrected by what
    other texts taught: means over all steps, and over tenths of them. Empty where there are no trees."""
    rows: dict[str, dict[str, Any]] = {}
    for name, platt in (("drafted", None), ("corrected", tuple(taught))):
        tree = DynamicPolicy(max(2, *costs.sizes), platt=platt)
        steps = np.array(walk(judged, tree, AlwaysOpen(), costs).promises, dtype=np.float64).reshape(-1, 2)
        if len(steps):
            promised, gained = by_quantile(steps[:, 0], steps[:, 1])
            mean = steps.mean(0).tolist()
            rows[name] = {"mean_promised": mean[0], "mean_gained": mean[1], "promised": promised, "gained": gained}
    return rows


def size_rows(choice: Choice, costs: StepCosts, context: float) -> list[dict[str, Any]]:
    """Per size of the tree without a gate: nodes, seconds of a step, tokens a step, tokens a second.

    With a static tree, whose depth is told, and, where there is one, with a dynamic tree.
    """
    seconds = {False: costs.by_size(context, asked=False), True: costs.by_size(context, asked=True)}
    rows = []
    for name, setting in choice.settings.items():
        if setting.kind in UNGATED:
            tally, size, dynamic = choice.tallies[name], setting.tree.size, isinstance(setting.tree, DynamicPolicy)
            rows.append(
                {
                    "size": size,
                    "depth": setting.tree.depth if isinstance(setting.tree, StaticPolicy) else None,
                    "step_seconds": seconds[dynamic][size],
                    "tokens_per_step": tally.tokens_per_step,
                    "tokens_per_second": tally.tokens_per_second,
                }
            )
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
    taught = Fit(fitted, costs.sizes).platt
    context = fmean(text.prompt + place for text in texts for place in range(len(text)))
    rates = {kind: choice.best(kind) for kind in KINDS}
    trees = {name: one.tree for name, one in choice.settings.items() if isinstance(one.tree, StaticPolicy)}
    best_open = trees[rates["open"] or PLAIN]
    tree = best_open if best_open.size > 1 else max(trees.values(), key=lambda tree: tree.size)
    return {
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "mean_context": context,
        "agreeing": fmean(text.agreeing for text in texts),
        "costs": {
            "contexts": costs.contexts,
            "sizes": costs.sizes,
            "open": costs.open,
            "asked": costs.asked,
            "entropy": costs.entropy,
            "spread": costs.spread,
            "compile_seconds": costs.compile_seconds,
        },
        "sizes": size_rows(choice, costs, context),
        "gates": {
            kind: {
                "name": name,
                "tokens_per_second": choice.tallies[name].tokens_per_second,
                "tokens_per_step": choice.tallies[name].tokens_per_step,
                "gate_open_rate": choice.tallies[name].gate_open_rate,
            }
            for kind, name in rates.items()
            if name is not None
        },
        "chosen": choice.chosen,
        "signals_of_tree": tree.size,
        "signals": signal_rows(texts, tree),
        "reliability": reliability_rows(judged, taught),
        "promises": promise_rows(judged, taught, costs),
        "validation": {name: one.row() for name, one in measured.items()},
        "gate_gain": None if gain is None else asdict(gain),
    }


def text(calibration: Calibration) -> str:
    """Tables for a terminal."""
    found, expected = calibration.details, calibration.expected
    lines = [
        f"{calibration.device}, {calibration.dtype}"
        + (f", {calibration.threads} threads" if calibration.threads else "")
        + (f", steps compiled in {found['costs']['compile_seconds']:.0f} s" if calibration.compiled else "")
        + f"; {found['texts']} texts, {found['tokens']} tokens, mean context {found['mean_context']:.0f}",
        "",
        "nodes  depth  ms a step  tokens a step  tokens/s",
    ]
    for row in found["sizes"]:
        depth = "each" if row["depth"] is None else row["depth"]
        lines.append(
            f"{row['size']:5}  {depth:>5}  {1000 * row['step_seconds']:9.2f}  {row['tokens_per_step']:13.3f}"
            f"  {row['tokens_per_second']:8.1f}"
        )
    lines += ["", "gate          tokens/s  tokens a step   open  setting"]
    for kind, row in found["gates"].items():
        lines.append(
            f"{kind:12}  {row['tokens_per_second']:8.1f}  {row['tokens_per_step']:13.3f}"
            f"  {100 * row['gate_open_rate']:4.0f} %  {row['name']}"
        )
    lines += ["", "signal                       AUC for at least one accepted draft"]
    for row in found["signals"]:
        lines.append(f"{row['name']:27}  {'none' if row['auc'] is None else format(row['auc'], '.3f')}")
    errors = (
        f"head {number}: {head['drafted']['error']:.3f} -> {head['corrected']['error']:.3f}"
        for number, head in enumerate(found["reliability"], start=1)
    )
    lines += ["", f"calibration error of the best draft, as drafted -> corrected: {', '.join(errors)}"]
    for name, row in found["promises"].items():
        lines.append(
            f"tokens a step with {found['costs']['sizes'][-1]} nodes of its own, {name}:"
            f" promised {row['mean_promised']:.2f}, gained {row['mean_gained']:.2f}"
        )
    if found["validation"]:
        width = max(len(name) for name in [*found["validation"], "validation"])
        lines += ["", f"{'validation':{width}}  predicted tokens/s  measured  predicted steps  measured"]
        for name, row in found["validation"].items():
            lines.append(
                f"{name:{width}}  {row['predicted_tokens_per_second']:18.1f}  {row['tokens_per_second']:8.1f}"
                f"  {row['predicted_steps']:15}  {row['steps']:8}"
                + ("" if row["same_texts"] else "  (other texts: near ties)")
            )
    if gain := found["gate_gain"]:
        between = "" if gain["interval"] is None else " ({:.3f} - {:.3f})".format(*gain["interval"])
        clock = f"by the clock {gain['measured']:.3f}x{between}"
        lines.append(f"gate over the best tree without one: foreseen {gain['foreseen']:.3f}x, {clock}")
    pace = " at the pace of both step times and validation" if found["validation"] else ""
    lines += [
        "",
        f"chosen: {found['chosen']}; expected: {expected.tokens_per_second:.1f} tokens/s{pace},"
        f" {expected.tokens_per_step:.2f} tokens a step, {expected.speed_up:.2f}x plain decoding"
        f" ({expected.plain_tokens_per_second:.1f} tokens/s);"
        f" step times vary by {100 * found['costs']['spread']:.0f} %",
    ]
    return "\n".join(lines)
