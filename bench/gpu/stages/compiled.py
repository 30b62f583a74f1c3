"""Stage "compiled" of a GPU session: `generate` with a static cache and torch.compile, which takes long to warm up.

It takes turns with plain `generate` in a process of its own; the ratio of both is what compares with the other ways.
"""

from __future__ import annotations

import time
from statistics import median

import stage
import torch
from subject import GENERATE, load, once

from cerberus_ext.evaluation.ways import GenerateWay

STATIC = "generate, static cache, compiled"


def body(run: stage.Stage) -> None:
    prompts, new, rounds = (2, 12, 1) if run.on_cpu else (4, 128, 2)
    subject = load(run, torch.float32 if run.on_cpu else torch.bfloat16, prompts)
    # On a GPU transformers compiles the forward by itself where the cache is static.
    ways = [GenerateWay(GENERATE, subject.model)]
    ways.append(GenerateWay(STATIC, subject.model, options={"cache_implementation": "static"}))
    # The longest prompt first: a shorter one then fits into its cache, and nothing is compiled again.
    subject.prompts.sort(key=lambda ids: ids.shape[1], reverse=True)
    run.result |= {
        "model": subject.name,
        "compiled": not run.on_cpu,
        "note": "static cache only: on the CPU transformers does not compile" if run.on_cpu else "",
        "new_tokens": new,
    }
    begin = time.perf_counter()
    for way in ways:
        for _ in range(2):  # the second time still records CUDA graphs
            way.run(subject.prompts[0], new)
    run.result["warm_up_seconds"] = time.perf_counter() - begin
    run.save()
    for turn in range(rounds):
        for index, ids in enumerate(subject.prompts):
            if run.begin(f"round {turn} of question {index}", limit=60):
                speeds = {way.name: once(way, ids, new)[2] for way in ways}
                run.add(f"round {turn} of question {index}", {"tokens_per_second": speeds})
    done = [row["tokens_per_second"] for row in run.rows.values() if "tokens_per_second" in row]
    if done:
        run.result["tokens_per_second"] = {way.name: median(speeds[way.name] for speeds in done) for way in ways}
        run.result["over_generate"] = median(speeds[STATIC] / speeds[GENERATE] for speeds in done)
