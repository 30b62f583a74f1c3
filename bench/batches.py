"""Tokens a second of several texts at once: with drafts, without, and transformers' batched `generate`.

    python bench/batches.py --questions mt_bench.jsonl --slots 1 2 4 8 --out batches.json

First turns of questions from all over the file. All are one call with so many slots; for `generate` batches of that
size, padded left. Ways take turns; each has its median. Ends with status 1 where a text with drafts is another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import cerberus_ext
from cerberus_ext import AlwaysClosed
from cerberus_ext.io.prompts import encode_chat, read_questions

sys.path.insert(0, str(Path(__file__).resolve().parent / "shared"))
import machine  # noqa: E402


def ours(model: Any, heads: Any, prompts: list[Tensor], new: int, slots: int, **options: Any) -> tuple[int, Any]:
    out = cerberus_ext.decode(model, heads, prompts, max_new_tokens=new, slots=slots, **options)
    return out.stats.new_tokens, out.sequences


def theirs(model: Any, prompts: list[Tensor], new: int, slots: int) -> tuple[int, Any]:
    end, tokens = model.generation_config.eos_token_id, 0
    for begin in range(0, len(prompts), slots):
        part = prompts[begin : begin + slots]
        longest = max(prompt.shape[1] for prompt in part)
        missing = [longest - prompt.shape[1] for prompt in part]
        ids = torch.cat([torch.nn.functional.pad(p, (m, 0), value=end) for p, m in zip(part, missing, strict=True)])
        mask = torch.stack([(torch.arange(longest) >= m).long() for m in missing])
        out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new, pad_token_id=end)
        for row in out[:, longest:].tolist():
            tokens += row.index(end) + 1 if end in row else len(row)
    return tokens, None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=2, help="of the ways of this package; `generate` has one")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    model, tokenizer = cerberus_ext.load_default_model(getattr(torch, arguments.dtype))
    heads = cerberus_ext.CerberusHeads.from_pretrained("smollm2-135m-instruct")
    questions = read_questions(arguments.questions)
    chosen = questions[:: max(1, len(questions) // arguments.count)][: arguments.count]
    prompts, new = [encode_chat(tokenizer, question.turns[:1]) for question in chosen], arguments.new_tokens
    ours(model, heads, prompts[:1], 8, 1)  # what is made once for a model
    rows, wrong = [], 0
    for slots in arguments.slots:
        ways: dict[str, Callable[[], tuple[int, Any]]] = {
            "plain": partial(ours, model, heads, prompts, new, slots, gate=AlwaysClosed()),
            "drafts": partial(ours, model, heads, prompts, new, slots),
            "generate": partial(theirs, model, prompts, new, slots),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        texts = {}
        for turn in range(arguments.rounds):
            for name, way in list(ways.items())[:: 1 if turn % 2 == 0 else -1]:
                if name == "generate" and turn:
                    continue
                begin = time.perf_counter()
                tokens, texts[name] = way()
                speeds[name].append(tokens / (time.perf_counter() - begin))
        wrong += not texts["plain"].equal(texts["drafts"])
        rows.append({"slots": slots, **{name: round(median(found), 1) for name, found in speeds.items()}})
        print(rows[-1], flush=True)
    if arguments.out:
        about = machine.describe() | {"questions": len(prompts), "new_tokens": new, "dtype": arguments.dtype}
        arguments.out.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
