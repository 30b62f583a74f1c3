"""Stage "end_to_end" of a GPU session: tokens a second over questions, of this loop and of transformers' ways.

    python bench/gpu_end_to_end.py --out end_to_end.json

The ways take turns on every question, so that whatever disturbs one disturbs all. Reported are medians over the
questions of tokens/s and of the ratio to another way on the same question and round.
"""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

import stage
import torch
from gpu_model import TREES, Subject, Way, generate, load, our_ways
from timing import tried, wait_for
from torch import Tensor

import cerberus_ext
from cerberus_ext import DecodeStats
from cerberus_ext.evaluation.texts import difference

GENERATE = "generate"
LOOKUP = 10  # tokens that prompt lookup takes, transformers' usual number


def all_ways(subject: Subject, device: str) -> dict[str, Way]:
    ways = {GENERATE: generate(subject), "generate, prompt lookup": generate(subject, prompt_lookup_num_tokens=LOOKUP)}
    if device == "cpu":
        return ways | our_ways(subject, device, False, TREES[:2])
    return ways | our_ways(subject, device, False, ()) | our_ways(subject, device, True)


def once(way: Way, ids: Tensor, new: int, device: str) -> tuple[float, Tensor, DecodeStats | None]:
    """tokens/s from prompt to last token, the text, the statistics of our loop"""
    wait_for(device)
    begin = time.perf_counter()
    text, stats = way(ids, new)
    wait_for(device)
    return (text.shape[1] - ids.shape[1]) / (time.perf_counter() - begin), text, stats


def body(run: stage.Stage) -> None:
    on_cpu = run.device == "cpu"
    prompts, new, rounds = (2, 12, 1) if on_cpu else (8, 128, 3)
    dtype = torch.float32 if on_cpu else torch.bfloat16
    subject = load(run.arguments, dtype, prompts)
    ways = all_ways(subject, run.device)
    run.result |= {
        "model": subject.name,
        "dtype": str(dtype).removeprefix("torch."),
        "new_tokens": new,
        "medusa": "no heads were given" if subject.medusa is None else "measured",
    }
    ready: dict[str, Way] = {}
    longest = max(subject.prompts, key=torch.numel)
    begin = time.perf_counter()
    for name, way in ways.items():  # the first time sets up kernels and graphs, and shows which ways work
        if run.begin(f"warm-up of {name}", limit=60):
            _, failure = tried(partial(way, longest, new), run.device)
            run.add(f"warm-up of {name}", {"error": failure} if failure else {})
            if failure:
                run.problems.append(f"{name}: {failure}")
                cerberus_ext.Decoder(subject.model).close()  # so that the next size is tried, too
        if not run.rows.get(f"warm-up of {name}", {"error": "not done"}).get("error"):
            ready[name] = way
    texts: dict[tuple[str, int], Tensor] = {}
    samples: dict[str, list[DecodeStats]] = {name: [] for name in ready}

    def summaries() -> list[dict[str, Any]]:
        return [summary(name, run.rows, samples.get(name, []), subject) for name in ways]

    slowest = time.perf_counter() - begin  # a round does what the warm-up did
    for turn in range(rounds):
        for index, ids in enumerate(subject.prompts):
            key = f"round {turn} of question {index}"
            if not ready or not run.begin(key, limit=120, needed=slowest):
                continue
            start = time.perf_counter()
            speeds: dict[str, float] = {}
            for name, way in ready.items():
                speeds[name], text, stats = once(way, ids, new, run.device)
                samples[name] += [] if stats is None else [stats]
                texts.setdefault((name, index), text)
            slowest = time.perf_counter() - start
            run.add(key, {"tokens_per_second": speeds})
            run.result["ways"] = summaries()
            run.save()
    found = [row | parted(row["way"], texts, subject, run) for row in summaries()]
    run.result["ways"] = found + best_tree(found)


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


def parted(
    name: str, texts: dict[tuple[str, int], Tensor], subject: Subject, run: stage.Stage
) -> dict[str, list[dict[str, Any]]]:
    """Where a way's texts part from those of our loop and of `generate`, and the gap of the two best logits there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for other in {our_loop({way for way, _ in texts}), GENERATE} - {None, name}:
        for index, ids in enumerate(subject.prompts):
            if (name, index) not in texts or (other, index) not in texts or run.left < 2:
                continue
            where = difference(subject.model, texts[name, index], texts[other, index], ids.shape[1])
            found.setdefault(f"parts_from {other}", [])
            if where is not None:
                found[f"parts_from {other}"].append({"question": index, **where})
    return found


def best_tree(ways: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of our ways with heads, once more, under a name of its own."""
    tried_trees = [way for way in ways if way["way"].startswith("cerberus") and way.get("over_loop")]
    best = max(tried_trees, key=lambda way: way["over_loop"], default=None)
    return [] if best is None else [{**best, "way": f"best {best['way']}"}]


if __name__ == "__main__":
    stage.main(__doc__, body)
