"""Stage "exactness" of a GPU session: in float32, is the text that of `generate`, and the same with every tree?

    python bench/gpu_exactness.py --out exactness.json

Other kernels round differently, so that where the model's two best tokens are within `NEAR_TIE` of each other either
may be taken: such a difference is reported, and no failure.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import stage
import torch
from gpu_model import TREES, Subject, generate, load, our_ways
from timing import tried
from torch import Tensor

import cerberus_ext
from cerberus_ext.evaluation.texts import difference

NEAR_TIE = 1e-3


def body(run: stage.Stage) -> None:
    on_cpu = run.device == "cpu"
    prompts, new = (2, 16) if on_cpu else (3, 64)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subject = load(run.arguments, torch.float32, prompts)
    ways = our_ways(subject, run.device, False, (8,) if on_cpu else (32,))
    if not on_cpu:
        ways |= our_ways(subject, run.device, True, TREES)
    run.result |= {"model": subject.name, "new_tokens": new, "prompts": prompts}
    wanted: dict[int, list[Tensor]] = {}

    def references(index: int, ids: Tensor) -> list[Tensor]:
        """The texts of `generate` and of our loop without drafts."""
        if index not in wanted:
            loop = next(iter(ways.values()))
            wanted[index] = [way(ids, new)[0] for way in (generate(subject), loop)]
        return wanted[index]

    for name, way in ways.items():
        if not run.begin(name, limit=60):
            continue
        row: dict[str, Any] = {
            "way": name,
            "has_targets": subject.has_targets,
            "texts": 0,
            "texts_differ": 0,
            "near_ties": [],
        }
        for index, ids in enumerate(subject.prompts):
            made, failure = tried(partial(way, ids, new), run.device)
            if made is None:
                row |= {"error": failure, "texts_differ": None}
                run.problems.append(f"{name}: {failure}")
                cerberus_ext.Decoder(subject.model).close()  # so that the next size is tried, too
                break
            found = compare(subject, made[0], references(index, ids), ids.shape[1])
            row["texts"] += 1
            near = [one["gap"] is not None and one["gap"] < NEAR_TIE for one in found]
            row["near_ties"] += [one for one, is_near in zip(found, near, strict=True) if is_near]
            real = [one for one, is_near in zip(found, near, strict=True) if not is_near]
            row["texts_differ"] += len(real) > 0
            run.problems += [f"{name}, prompt {index}: {one}" for one in real]
        run.add(name, row)


def compare(subject: Subject, text: Tensor, references: list[Tensor], prompt: int) -> list[dict[str, Any]]:
    """The differences from `generate` and from our loop."""
    found = []
    for what, reference in zip(("generate", "loop"), references, strict=True):
        where = difference(subject.model, text, reference, prompt)
        if where is not None:
            found.append({"from": what, **where})
    return found


if __name__ == "__main__":
    stage.main(__doc__, body)
