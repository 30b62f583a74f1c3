"""Stage "end_to_end" of a GPU session: tokens a second over questions, of this loop and of transformers' ways.

The ways take turns on every question, so that whatever disturbs one disturbs all. Reported are medians over the
questions of tokens/s and of the ratio to another way on the same question and round.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import stage
import torch
from subject import GENERATE, TREES, AnyWay, Subject, load, once, our_ways, try_once
from torch import Tensor

from cerberus_ext import DecodeStats
from cerberus_ext.evaluation.texts import difference
from cerberus_ext.evaluation.ways import GenerateWay

Texts = dict[tuple[str, int], Tensor]  # by way and question


def all_ways(subject: Subject, on_cpu: bool) -> list[AnyWay]:
    lookup = {"prompt_lookup_num_tokens": 10}  # transformers' usual number
    ways: list[AnyWay] = [GenerateWay(GENERATE, subject.model)]
    ways.append(GenerateWay("generate, prompt lookup", subject.model, options=lookup))
    if on_cpu:
        return ways + our_ways(subject, False, TREES[:2])
    return ways + our_ways(subject, False, ()) + our_ways(subject, True)


def body(run: stage.Stage) -> None:
    prompts, new, rounds = (2, 12, 1) if run.on_cpu else (8, 128, 3)
    dtype = torch.float32 if run.on_cpu else torch.bfloat16
    subject = load(run, dtype, prompts)
    ways = all_ways(subject, run.on_cpu)
    run.result |= {
        "model": subject.name,
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": new,
        "medusa": "no heads were given" if subject.medusa is None else "measured",
    }
    longest = max(subject.prompts, key=torch.numel)
    begin = time.perf_counter()
    ready = warmed_up(run, ways, longest, new)
    texts: Texts = {}
    samples: dict[str, list[DecodeStats]] = {way.name: [] for way in ways}
    slowest = time.perf_counter() - begin  # a round does what the warm-up did
    for turn in range(rounds):
        for index, ids in enumerate(subject.prompts):
            key = f"round {turn} of question {index}"
            if not ready or not run.begin(key, limit=120, needed=slowest):
                continue
            start = time.perf_counter()
            speeds: dict[str, float] = {}
            for way in ready:
                text, stats, speeds[way.name] = once(way, ids, new)
                samples[way.name] += [] if stats is None else [stats]
                texts.setdefault((way.name, index), text)
            slowest = time.perf_counter() - start
            run.add(key, {"tokens_per_second": speeds})
            run.result["ways"] = [summary(way.name, run.rows, samples[way.name], subject) for way in ways]
            run.save()
    rows = [summary(way.name, run.rows, samples[way.name], subject) for way in ways]
    found = [row | parted(row["way"], texts, subject, run) for row in rows]
    run.result["ways"] = found + best_tree(found)


def warmed_up(run: stage.Stage, ways: list[AnyWay], ids: Tensor, new: int) -> list[AnyWay]:
    """Those that work: the first call sets up kernels and graphs, and shows it."""
    for way in ways:
        if run.begin(f"warm-up of {way.name}", limit=60):
            _, failure = try_once(way, ids, new)
            run.add(f"warm-up of {way.name}", {"error": failure} if failure else {})
            run.problems += [f"{way.name}: {failure}"] if failure else []
    return [way for way in ways if not run.rows.get(f"warm-up of {way.name}", {"error": "not done"}).get("error")]


def our_loop(measured: set[str]) -> str | None:
    """Our loop without drafts: what drafts have to be faster than, and must not change the text of."""
    return next((way for way in ("loop, graphs", "loop, eager") if way in measured), None)


def summary(name: str, rows: dict[str, Any], samples: list[DecodeStats], subject: Subject) -> dict[str, Any]:
    """A way's row: medians over questions and rounds, and what the statistics sum up to."""
    rounds = [row["tokens_per_second"] for row in rows.values() if "tokens_per_second" in row]
    loop = our_loop({one for speeds in rounds for one in speeds})
    row: dict[str, Any] = {
        "way": name,
        "has_targets": subject.has_targets,
        "error": rows.get(f"warm-up of {name}", {}).get("error"),
        "texts": sum(name in speeds for speeds in rounds),
    }
    if not row["texts"]:
        return row
    row["tokens_per_second"] = median(speeds[name] for speeds in rounds if name in speeds)
    for column, other in ("over_generate", GENERATE), ("over_loop", loop):
        ratios = [speeds[name] / speeds[other] for speeds in rounds if name in speeds and other in speeds]
        row[column] = median(ratios) if ratios else None
        row[f"{column}_range"] = [min(ratios), max(ratios)] if ratios else None
    if samples:
        row["steps"] = sum(stats.steps for stats in samples)
        row["tokens_per_step"] = sum(stats.step_tokens for stats in samples) / max(1, row["steps"])
        for column in ("captures", "capture_seconds", "graphed_steps"):  # in the timed rounds
            row[column] = sum(getattr(stats, column) for stats in samples)
        row["fallback"] = next((stats.fallback for stats in samples if stats.fallback), None)
    return row


def parted(name: str, texts: Texts, subject: Subject, run: stage.Stage) -> dict[str, list[dict[str, Any]]]:
    """Where a way's texts part from those of our loop and of `generate`, and the gap of the two best logits there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for other in {our_loop({way for way, _ in texts}), GENERATE} - {None, name}:
        for index, ids in enumerate(subject.prompts):
            if (name, index) not in texts or (other, index) not in texts or run.left < 2:
                continue
            where = difference(subject.model, texts[name, index], texts[other, index], ids.shape[1])
            found.setdefault(f"parts_from {other}", []).extend([] if where is None else [{"question": index, **where}])
    return found


def best_tree(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of our ways with heads, once more, under a name of its own."""
    tried_trees = [way for way in ways if way["way"].startswith("cerberus") and way.get("over_loop")]
    best = max(tried_trees, key=lambda way: way["over_loop"], default=None)
    return [] if best is None else [{**best, "way": f"best {best['way']}"}]
