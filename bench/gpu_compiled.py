"""Stage "compiled" of a GPU session: `generate` with a static cache and torch.compile, which takes long to warm up.

    python bench/gpu_compiled.py --out compiled.json

It takes turns with plain `generate` in a process of its own; the ratio of both is what compares with the other ways.
"""

from __future__ import annotations

import time
from statistics import median

import stage
import torch
from gpu_end_to_end import GENERATE, once
from gpu_model import generate, load

STATIC = "generate, static cache, compiled"


def body(run: stage.Stage) -> None:
    on_cpu = run.device == "cpu"
    prompts, new, rounds = (2, 12, 1) if on_cpu else (4, 128, 2)
    subject = load(run.arguments, torch.float32 if on_cpu else torch.bfloat16, prompts)
    # On a GPU transformers compiles the forward by itself where the cache is static.
    ways = {GENERATE: generate(subject), STATIC: generate(subject, cache_implementation="static")}
    # The longest prompt first: a shorter one then fits into its cache, and nothing is compiled again.
    subject.prompts.sort(key=lambda ids: ids.shape[1], reverse=True)
    run.result |= {
        "model": subject.name,
        "compiled": not on_cpu,
        "note": "static cache only: on the CPU transformers does not compile" if on_cpu else "",
        "new_tokens": new,
    }
    begin = time.perf_counter()
    for way in ways.values():
        for _ in range(2):  # the second time still records CUDA graphs
            way(subject.prompts[0], new)
    run.result["warm_up_seconds"] = time.perf_counter() - begin
    run.save()
    for turn in range(rounds):
        for index, ids in enumerate(subject.prompts):
            if run.begin(f"round {turn} of question {index}", limit=60):
                speeds = {name: once(way, ids, new, run.device)[0] for name, way in ways.items()}
                run.add(f"round {turn} of question {index}", {"tokens_per_second": speeds})
    rounds_done = [row["tokens_per_second"] for row in run.rows.values() if "tokens_per_second" in row]
    if rounds_done:
        run.result["tokens_per_second"] = {name: median(speeds[name] for speeds in rounds_done) for name in ways}
        run.result["over_generate"] = median(speeds[STATIC] / speeds[GENERATE] for speeds in rounds_done)


if __name__ == "__main__":
    stage.main(__doc__, body)
