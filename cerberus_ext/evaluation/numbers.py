"""Results -> the summary: what bench.json holds, and what tables, plots and page show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .bootstrap import bootstrap_interval, median_of_ratios, ratio_of_totals
from .results import Results
from .texts import NEAR_TIE_UNITS, is_near_tie
from .ways import AUTOREGRESSIVE, AUTOREGRESSIVE_COMPILED, BOTH, GENERATE, MEDUSA, STATIC

ALL = "all"
BASELINES = (AUTOREGRESSIVE, AUTOREGRESSIVE_COMPILED, GENERATE)  # what does not draft
REFERENCES = (*BASELINES, STATIC, BOTH)  # what speed-ups are over
Row = dict[str, Any]


def summarize(results: Results) -> dict[str, Any]:
    """Everything that was measured on texts that all ways have made; the others are not finished yet.

    Raises ValueError where there is none.
    """
    identity, about = results.identity, results.about
    if identity is None:
        raise ValueError(f"bench: there must be results in {results.file}, got none")
    names = list(identity["ways"])
    keys = [row["key"] for row in results if "parts" in row]
    if not keys:
        raise ValueError(f"bench: {results.file.name} must have a text that every way has made, got none")
    rows = {name: typical_rounds([results[f"{key}/{name}"] for key in keys]) for name in names}
    categories = list(dict.fromkeys(row["category"] for row in rows[AUTOREGRESSIVE] if row["category"]))
    seed = identity["seed"]
    ways = {
        name: {
            category: numbers_of(chosen(rows[name], category), {
                other: chosen(rows[other], category) for other in REFERENCES if other in rows
            }, seed)
            for category in (ALL, *categories)
        }
        for name in names
    }  # fmt: skip
    return {
        "about": about,
        "settings": identity,
        "texts": len(rows[AUTOREGRESSIVE]),
        "questions": len({row["question"] for row in rows[AUTOREGRESSIVE]}),
        "categories": [ALL, *categories],
        "ways": ways,
        "over_medusa": over_medusa(rows, [ALL, *categories], seed),
        "expected": expected(ways, about["expected"]),
        "compiled": compiled(results, ways),
        "equality": equality(results, keys, names),
    }


def typical_rounds(rows: Sequence[Row]) -> list[Row]:
    """Of the rounds of each text the one with the median time, the faster of the two in the middle."""
    rounds: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        rounds.setdefault((row["question"], row["turn"]), []).append(row)
    return [sorted(same, key=lambda row: row["seconds"])[(len(same) - 1) // 2] for same in rounds.values()]


def chosen(rows: Iterable[Row], category: str) -> list[Row]:
    return [row for row in rows if category in (ALL, row["category"])]


def numbers_of(rows: Sequence[Row], references: dict[str, list[Row]], seed: int) -> dict[str, Any]:
    """A way's numbers over some texts. references: the same texts of the ways that it is compared with."""
    tokens, seconds = sum(len(row["tokens"]) for row in rows), sum(row["seconds"] for row in rows)
    found = {
        "texts": len(rows),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "over": {
            name: speed_up(by_question(rows, speed_terms), by_question(others, speed_terms), seed)
            for name, others in references.items()
        },
    }
    if all(row["stats"] is not None for row in rows):
        found["decode"] = decode_numbers(rows, tokens)
    return found


def decode_numbers(rows: Sequence[Row], tokens: int) -> dict[str, Any]:
    """What `decode` counted."""
    stats = [row["stats"] for row in rows]
    steps, opened = sum(one["steps"] for one in stats), sum(one["open_steps"] for one in stats)
    parts = {phase: sum(one["seconds"][phase] for one in stats) for phase in ("prefill", "draft", "verify")}
    total = sum(row["seconds"] for row in rows)
    histogram = [0] * max(len(one["accepted_histogram"]) for one in stats)
    for one in stats:
        for accepted, count in enumerate(one["accepted_histogram"]):
            histogram[accepted] += count
    after_prompt = sum(sum(one["seconds"].values()) for one in stats) - parts["prefill"]
    return {
        "steps": steps,
        "tokens_per_step": ratio(sum(one["step_tokens"] for one in stats), steps),
        "nodes_per_step": ratio(sum(nodes for one in stats for nodes, _ in one["trace"]), steps),
        "accepted_histogram": histogram,
        "accepts_nothing": ratio(sum(one["zero_accept_steps"] for one in stats), opened),
        "gate_open_rate": ratio(opened, steps),
        "tokens_per_second": ratio(tokens - len(rows), after_prompt),  # a text's first token comes with its prompt
        "seconds": {**parts, "rest": total - sum(parts.values())},
        "graphed_steps": sum(one["graphed_steps"] for one in stats),
        "capture_seconds": sum(one["capture_seconds"] for one in stats),
        # Before there were compiled steps, nothing was counted.
        "compile_seconds": sum(one.get("compile_seconds", 0.0) for one in stats),
    }


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def speed_terms(row: Row) -> tuple[float, float]:
    return len(row["tokens"]), row["seconds"]


def step_terms(row: Row) -> tuple[float, float]:
    return row["stats"]["step_tokens"], row["stats"]["steps"]


def by_question(rows: Sequence[Row], terms: Any) -> dict[str, np.ndarray]:
    """Sums over the turns of a question, which are not independent of each other: question -> (2,)"""
    found: dict[str, np.ndarray] = {}
    for row in rows:
        found[row["question"]] = found.get(row["question"], np.zeros(2)) + terms(row)
    return found


def speed_up(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], seed: int) -> dict[str, Any]:
    """How much more per unit ours is: of the totals, and the median over the questions, each with its interval."""
    pairs = np.stack([np.concatenate([ours[question], theirs[question]]) for question in ours])  # (Q, 4)
    pairs = pairs[(pairs != 0).all(axis=1)]  # an answer that ended with its first token took no step
    if not len(pairs):
        return {"total": None, "total_interval": None, "median": None, "median_interval": None}
    return {
        "total": float(ratio_of_totals(pairs)),
        "total_interval": bootstrap_interval(ratio_of_totals, pairs, seed),
        "median": float(median_of_ratios(pairs)),
        "median_interval": bootstrap_interval(median_of_ratios, pairs, seed),
    }


def over_medusa(rows: dict[str, list[Row]], categories: Sequence[str], seed: int) -> dict[str, Any]:
    """Tokens a step over those of Medusa's heads: way -> category -> as `speed_up`."""
    if MEDUSA not in rows:
        return {}
    others = [
        name for name, own in rows.items()
        if name not in (MEDUSA, AUTOREGRESSIVE) and all(row["stats"] is not None for row in own)
    ]  # fmt: skip
    return {
        name: {
            category: speed_up(
                by_question(chosen(rows[name], category), step_terms),
                by_question(chosen(rows[MEDUSA], category), step_terms),
                seed,
            )
            for category in categories
        }
        for name in others
    }


def expected(ways: dict[str, Any], promised: dict[str, float]) -> dict[str, Any]:
    """Tokens a second that were foreseen, and those that came. Where `decode` ran, without the prompt's forward."""
    found = {}
    for name, value in promised.items():
        numbers = ways[name][ALL]
        measured = (numbers.get("decode") or numbers)["tokens_per_second"]
        if measured:
            found[name] = {
                "expected": value,
                "measured": measured,
                "deviation_percent": (value / measured - 1) * 100,
            }
    return found


def compiled(results: Results, ways: dict[str, Any]) -> dict[str, Any]:
    """What was compiled before anything was timed, by way, and the seconds of compiling in timed texts. What a way
    needs and an earlier one has compiled is counted there."""
    return {
        name: {
            "compilations": row["compilations"],
            "compile_seconds": row["compile_seconds"],
            "timed_compile_seconds": ways[name][ALL]["decode"]["compile_seconds"],
        }
        for name in ways
        if (row := results.get(f"compiled/{name}")) is not None and "decode" in ways[name][ALL]
    }


def equality(results: Results, keys: Sequence[str], names: Sequence[str]) -> dict[str, Any]:
    """Which texts part from the autoregressive way's, and which of them should not.

    A violation is: in float32, any difference; else, one of a way that ran in `decode` on a CPU, where not a bit may
    differ, and one that rounding does not explain. Ways with compiled steps: see `Measuring.compare`.
    """
    assert results.identity is not None
    dtype = getattr(torch, results.identity["dtype"])
    on_cpu = results.identity["device"] == "cpu"
    parted: dict[str, list[Row]] = {name: [] for name in names}
    violations = []
    for key in keys:
        for name, found in results[key]["parts"].items():
            entry = {
                "text": key, "way": name, "other": AUTOREGRESSIVE,
                "exact": on_cpu and results[f"{key}/{name}"]["stats"] is not None,  # results that do not say it
                **found,
            }  # fmt: skip
            parted[name].append(entry)
            if entry["exact"] or not is_near_tie(found, dtype):
                violations.append(entry)
    gaps = {name: [one["gap"] for one in found if one["gap"] is not None] for name, found in parted.items()}
    return {
        "texts": len(keys),
        "different": {name: len(found) for name, found in parted.items()},
        "largest_gap": {name: max(found) if found else None for name, found in gaps.items()},
        "near_tie_units": None if dtype == torch.float32 else NEAR_TIE_UNITS,
        "violations": violations,
    }
