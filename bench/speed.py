"""How fast is decoding with drafts? On the default model, over MT-Bench questions, in one process.

    python bench/speed.py --questions mt_bench.jsonl --out speed.jsonl

For every question three ways take turns, `--rounds` times, each timed from prompt to last token: model.generate, decode
with the gate never open ("plain"), and decode with the trained heads and the default tree and gate ("drafts"). A
question's speed-up is the ratio of the medians of its rounds; reported are the medians over the questions.
Stopped and started again, it goes on with the next question.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
from questions import Results, encode, read_questions
from timing import wait_for
from torch import Tensor

import cerberus_ext
from cerberus_ext import AlwaysClosed
from cerberus_ext.default_model import default_dtype
from cerberus_ext.tree import default_tree

WAYS = ("generate", "plain", "drafts")


def timed(call: Callable[[], Any], device: str) -> tuple[float, Any]:
    wait_for(device)
    begin = time.perf_counter()
    output = call()
    wait_for(device)
    return time.perf_counter() - begin, output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with question_id and turns")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: what suits the device")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained", default="smollm2-135m-instruct", help="packaged name, folder or Hub id of heads")
    parser.add_argument("--tree-size", type=int, help="nodes; default: decode's own")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else default_dtype(arguments.device)
    model, tokenizer = cerberus_ext.load_default_model(dtype, arguments.device)
    heads = cerberus_ext.CerberusHeads.from_pretrained(arguments.trained).to(dtype)
    tree = default_tree(heads, torch.device(arguments.device), arguments.tree_size)
    new = {"max_new_tokens": arguments.new_tokens}
    print(
        f"{machine.text()}\n{dtype}, {arguments.device}, tree of {tree.size} nodes and depth {tree.depth}", flush=True
    )

    def run(way: str, ids: Tensor) -> tuple[float, Tensor, Any]:
        if way == "generate":
            mask = torch.ones_like(ids)
            seconds, text = timed(
                lambda: model.generate(ids, attention_mask=mask, do_sample=False, **new), arguments.device
            )
            return seconds, text, None
        options: dict[str, Any] = {"gate": AlwaysClosed()} if way == "plain" else {"tree": tree}
        seconds, out = timed(lambda: cerberus_ext.decode(model, heads, ids, **options, **new), arguments.device)
        return seconds, out.sequences, out.stats

    results = Results(arguments.out)
    questions = read_questions(arguments.questions, arguments.limit)
    for way in WAYS:  # warm up
        run(way, encode(tokenizer, questions[0][1], arguments.device))
    for question_id, question in questions:
        if str(question_id) in results:
            continue
        ids = encode(tokenizer, question, arguments.device)
        speeds: dict[str, list[float]] = {way: [] for way in WAYS}
        texts: dict[str, Tensor] = {}
        for _ in range(arguments.rounds):
            for way in WAYS:
                seconds, texts[way], stats = run(way, ids)
                speeds[way].append((texts[way].shape[1] - ids.shape[1]) / seconds)
        row: dict[str, Any] = {f"{way}_tokens_per_second": median(speeds[way]) for way in WAYS}
        row["tokens_per_step"] = stats.tokens_per_step
        row["seconds"] = {name: round(value, 4) for name, value in stats.seconds.items()}
        row["drafts_over_plain"] = median(speeds["drafts"]) / median(speeds["plain"])
        row["drafts_over_generate"] = median(speeds["drafts"]) / median(speeds["generate"])
        row["plain_over_generate"] = median(speeds["plain"]) / median(speeds["generate"])
        row["same_as_plain"] = texts["drafts"].equal(texts["plain"])
        row["same_as_generate"] = texts["drafts"].equal(texts["generate"])
        results.add(str(question_id), **row)
        print(question_id, json.dumps(row), flush=True)

    rows = list(results)
    for name in (*(f"{way}_tokens_per_second" for way in WAYS), "tokens_per_step"):
        print(f"median {name}: {median(row[name] for row in rows):.2f}")
    for name in ("drafts_over_plain", "drafts_over_generate", "plain_over_generate"):
        values = [row[name] for row in rows]
        print(f"median {name}: {median(values):.3f} (lowest {min(values):.3f}, highest {max(values):.3f})")
    for name in ("same_as_plain", "same_as_generate"):
        print(f"{name}: {sum(row[name] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
