"""Results -> the summary: what bench.json holds, and what tables, plots and page show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from .bootstrap import Statistic, bootstrap_interval, median_of_ratios, ratio_of_totals
from .results import Results
from .texts import NEAR_TIE_UNITS, is_near_tie
from .ways import AUTOREGRESSIVE, BOTH, GENERATE, LLAMA_BF16, LLAMA_Q4_1, MEDUSA, STATIC

ALL = "all"
BASELINES = (AUTOREGRESSIVE, GENERATE, LLAMA_BF16, LLAMA_Q4_1)  # what does not draft
REFERENCES = (*BASELINES, STATIC, BOTH)  # what speed-ups are over
Row = dict[str, Any]
Terms = Callable[[Row], tuple[float, float]]


def summarize(results: Results) -> dict[str, Any]:
    """Everything that was measured on texts that all ways have made; the others are not finished yet.

    Raises ValueError where there is none.
    """
    identity, about = results.identity, results.about
    if identity is None:
        raise ValueError(f"bench: there must be results in {results.file}, got none")
    names = list(identity["ways"])
    keys = [key for key, row in results.items() if "parts" in row]
    if not keys:
        raise ValueError(f"bench: {results.file.name} must have a text that every way has made, got none")
    rows = {name: typical_rounds(results[f"{key}/{name}"] for key in keys) for name in names}
    texts = rows[AUTOREGRESSIVE]
    categories = [ALL, *dict.fromkeys(row["category"] for row in texts if row["category"])]
    parts = {name: {one: chosen(rows[name], one) for one in categories} for name in names}  # way -> category -> rows

    def over(name: str, other: str, category: str, terms: Terms) -> dict[str, Any]:
        return speed_up(parts[name][category], parts[other][category], terms, identity["seed"])

    ways = {
        name: {
            category: numbers_of(own)
            | {
                "over": {
                    one: over(name, one, category, lambda row: (len(row["tokens"]), row["seconds"]))
                    for one in REFERENCES
                    if one in names
                }
            }
            for category, own in parts[name].items()
        }
        for name in names
    }
    beside_medusa = [
        name for name in names
        if MEDUSA in names and name not in (MEDUSA, AUTOREGRESSIVE) and "decode" in ways[name][ALL]
    ]  # fmt: skip
    return {
        "about": about,
        "settings": identity,
        "texts": len(texts),
        "questions": len({row["question"] for row in texts}),
        "categories": categories,
        "ways": ways,
        "over_medusa": {
            name: {
                one: over(name, MEDUSA, one, lambda row: (row["stats"]["step_tokens"], row["stats"]["steps"]))
                for one in categories
            }
            for name in beside_medusa
        },
        "expected": expected(ways, about["expected"]),
        "equality": equality(results, keys, names, about.get("not_compared", {})),
    }


def typical_rounds(rows: Iterable[Row]) -> list[Row]:
    """Of the rounds of each text the one with the median time, the faster of the two in the middle."""
    rounds: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        rounds.setdefault((row["question"], row["turn"]), []).append(row)
    return [sorted(same, key=lambda row: row["seconds"])[(len(same) - 1) // 2] for same in rounds.values()]


def chosen(rows: Iterable[Row], category: str) -> list[Row]:
    return [row for row in rows if category in (ALL, row["category"])]


def numbers_of(rows: Sequence[Row]) -> dict[str, Any]:
    """A way's numbers over some texts."""
    tokens, seconds = sum(len(row["tokens"]) for row in rows), sum(row["seconds"] for row in rows)
    found = {"texts": len(rows), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    if all(row["stats"] is not None for row in rows):
        found["decode"] = decode_numbers([row["stats"] for row in rows], tokens, seconds)
    return found


def decode_numbers(stats: Sequence[Row], tokens: int, seconds: float) -> dict[str, Any]:
    """What `decode` counted, over texts of so many tokens and seconds in all."""

    def total(name: str) -> Any:
        return sum(one[name] for one in stats)

    steps = total("steps")
    phases = {phase: sum(one["seconds"][phase] for one in stats) for phase in ("prefill", "draft", "verify")}
    after_prompt = sum(sum(one["seconds"].values()) for one in stats) - phases["prefill"]
    histograms = (one["accepted_histogram"] for one in stats)
    return {
        "steps": steps,
        "tokens_per_step": ratio(total("step_tokens"), steps),
        "nodes_per_step": ratio(sum(nodes for one in stats for nodes, _ in one["trace"]), steps),
        "accepted_histogram": [sum(counts) for counts in zip_longest(*histograms, fillvalue=0)],
        "accepts_nothing": ratio(total("zero_accept_steps"), total("open_steps")),
        "gate_open_rate": ratio(total("open_steps"), steps),
        "tokens_per_second": ratio(tokens - len(stats), after_prompt),  # a text's first token comes with its prompt
        "seconds": {**phases, "rest": seconds - sum(phases.values())},
    }


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def by_question(rows: Iterable[Row], terms: Terms) -> np.ndarray:
    """(Q, 2): sums over the turns of each question, which are not independent of each other."""
    found: dict[str, np.ndarray] = {}
    for row in rows:
        found[row["question"]] = found.get(row["question"], 0) + np.array(terms(row), dtype=np.float64)
    return np.stack(list(found.values()))


def speed_up(ours: Sequence[Row], theirs: Sequence[Row], terms: Terms, seed: int) -> dict[str, Any]:
    """How much more per unit ours is: of the totals, and the median over the questions, each with its interval.

    The rows are of the same texts, in the same order.
    """
    pairs = np.hstack([by_question(ours, terms), by_question(theirs, terms)])  # (Q, 4)
    pairs = pairs[(pairs != 0).all(axis=1)]  # an answer that ended with its first token took no step
    statistics: dict[str, Statistic] = {"total": ratio_of_totals, "median": median_of_ratios}
    found: dict[str, Any] = {}
    for name, statistic in statistics.items():
        found[name] = float(statistic(pairs)) if len(pairs) else None
        found[f"{name}_interval"] = bootstrap_interval(statistic, pairs, seed)
    return found


def expected(ways: dict[str, Any], foreseen: dict[str, float]) -> dict[str, Any]:
    """Tokens a second that were expected, and those that came. Where `decode` ran, without the prompt's forward."""
    found = {}
    for name, value in foreseen.items():
        numbers = ways[name][ALL]
        measured = (numbers.get("decode") or numbers)["tokens_per_second"]
        if measured:
            deviation = (value / measured - 1) * 100
            found[name] = {"expected": value, "measured": measured, "deviation_percent": deviation}
    return found


def equality(results: Results, keys: Sequence[str], names: Sequence[str], left_out: dict[str, str]) -> dict[str, Any]:
    """Which texts part from the autoregressive way's, and which of them should not.

    A violation is: in float32, any difference; else, one of a way that ran in `decode` on a CPU, where not a bit may
    differ, and one that rounding does not explain. left_out: ways that are not compared, and why.
    """
    assert results.identity is not None
    dtype = getattr(torch, results.identity["dtype"])
    entries = [{"text": key, "way": name, **found} for key in keys for name, found in results[key]["parts"].items()]
    parted: dict[str, list[Row]] = {
        name: [one for one in entries if one["way"] == name] for name in names if name not in left_out
    }
    return {
        "texts": len(keys),
        "not_compared": left_out,
        "different": {name: len(found) for name, found in parted.items()},
        "largest_gap": {
            name: max((one["gap"] for one in found if one["gap"] is not None), default=None)
            for name, found in parted.items()
        },
        "near_tie_units": None if dtype == torch.float32 else NEAR_TIE_UNITS,
        "violations": [one for one in entries if one["exact"] or not is_near_tie(one, dtype)],
    }
