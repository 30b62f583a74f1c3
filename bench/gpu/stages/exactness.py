"""Stage "exactness" of a GPU session: in float32, is the text that of `generate`, and the same with every tree? In
bfloat16, is it the same with every tree?

Other kernels round differently, so that in float32, where the model's two best tokens are within `NEAR_TIE` of each
other, either may be taken: such a difference is reported, and no failure. In bfloat16 the text with drafts has the bits
of the text without them, or something is wrong.
"""

from __future__ import annotations

from typing import Any

import stage
import torch
from subject import GENERATE, TREES, load, once, our_ways, try_once
from targets import BFLOAT16
from torch import Tensor

from cerberus_ext.evaluation.texts import difference
from cerberus_ext.evaluation.ways import GenerateWay

NEAR_TIE = 1e-3


def body(run: stage.Stage) -> None:
    against_generate(run)
    against_no_drafts(run)


def against_no_drafts(run: stage.Stage) -> None:
    """In bfloat16."""
    prompts, new = (2, 16) if run.on_cpu else (32, 64)
    subject = load(run, torch.bfloat16, prompts)
    ways = our_ways(subject, not run.on_cpu, (8,) if run.on_cpu else (8, 32))
    alone: list[Tensor] = []
    for way in ways:
        name = BFLOAT16 + way.name
        if not run.begin(name, limit=60):
            continue
        row: dict[str, Any] = {"way": name, "has_targets": subject.has_targets, "near_ties": []}
        texts = [try_once(way, ids, new) for ids in subject.prompts]
        failures = {failure for text, failure in texts if text is None}
        got = [text for text, _ in texts if text is not None]
        alone = got if way is ways[0] else alone
        pairs = [] if failures or len(alone) < len(got) else zip(got, alone, strict=True)
        differ = [index for index, (mine, other) in enumerate(pairs) if not mine.equal(other)]
        row |= {"texts": len(got), "texts_differ": len(differ) if pairs else None}
        if failures:
            row["error"] = "; ".join(map(str, failures))
            run.problems.append(f"{name}: {row['error']}")
        run.problems += [f"{name}, prompt {index}: another text than without drafts" for index in differ]
        run.add(name, row)


def against_generate(run: stage.Stage) -> None:
    """In float32."""
    prompts, new = (2, 16) if run.on_cpu else (3, 64)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    subject = load(run, torch.float32, prompts)
    ways = our_ways(subject, False, (8,) if run.on_cpu else (32,))
    if not run.on_cpu:
        ways += our_ways(subject, True, TREES)
    run.result |= {"model": subject.name, "new_tokens": new, "prompts": prompts}
    wanted: dict[tuple[int, str], Tensor] = {}  # the texts of `generate` and of our loop without drafts
    for way in ways:
        if not run.begin(way.name, limit=60):
            continue
        row: dict[str, Any] = {"way": way.name, "has_targets": subject.has_targets, "texts": 0, "texts_differ": 0}
        row["near_ties"] = []
        for index, ids in enumerate(subject.prompts):
            text, failure = try_once(way, ids, new)
            if text is None:
                row |= {"error": failure, "texts_differ": None}
                run.problems.append(f"{way.name}: {failure}")
                break
            found = []
            for name, other in ((GENERATE, GenerateWay(GENERATE, subject.model)), ("loop", ways[0])):
                if (index, name) not in wanted:
                    wanted[index, name] = once(other, ids, new)[0]
                where = difference(subject.model, text, wanted[index, name], ids.shape[1])
                found += [] if where is None else [{"from": name, **where}]
            row["texts"] += 1
            real = [one for one in found if one["gap"] is None or one["gap"] >= NEAR_TIE]
            row["near_ties"] += [one for one in found if one not in real]
            row["texts_differ"] += len(real) > 0
            run.problems += [f"{way.name}, prompt {index}: {one}" for one in real]
        run.add(way.name, row)
