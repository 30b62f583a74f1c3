"""Tokens a step of heads over questions, by category, without decoding with each of them.

    python bench/acceptance.py --questions mt_bench.jsonl --heads smollm2-135m-instruct my-heads --out acceptance.jsonl

The model writes its greedy answers once, both turns, into `--answers`. One pass over an answer tells what heads guess
at every place, and a walk through it takes the steps that `decode` would take (calibration/walk.py), so the numbers are
those of `cerberus bench --tree-size N`, in a fraction of the time. One row is added to `--out` for each heads and size.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cerberus_ext
from cerberus_ext import AlwaysOpen, CerberusHeads
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import Answer, TracedText, trace, write_answers
from cerberus_ext.calibration.walk import Tally, walk
from cerberus_ext.evaluation.machine import commit
from cerberus_ext.json_lines import read_json_lines
from cerberus_ext.prompts import Question, read_questions
from cerberus_ext.tree import default_tree

UNIT = StepCosts((1, 1 << 20), (1,), ((1.0,), (1.0,)), ((1.0,), (1.0,)))  # every step takes one second


def read_answers(file: Path) -> list[Answer]:
    return [
        Answer(line["question"], torch.tensor([line["ids"]]), line["prompt"], line["most"])
        for _, line in read_json_lines(file)
    ]


def write_answers_file(file: Path, model: Any, tokenizer: Any, questions: list[Question], new_tokens: int) -> None:
    heads = CerberusHeads.from_pretrained("smollm2-135m-instruct").to(model.dtype)
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        answers = write_answers(model, heads, tokenizer, questions, new_tokens)
        for answer in tqdm(answers, total=sum(len(question.turns) for question in questions), unit="answer"):
            row = {"question": answer.question, "prompt": answer.prompt, "most": answer.most}
            out.write(json.dumps({**row, "ids": answer.ids[0].tolist()}) + "\n")
    partial.replace(file)


def rates(tally: Tally) -> dict[str, float]:
    return {"tokens_per_step": round(tally.tokens_per_step, 4), "accept_nothing": round(tally.wasted_step_rate, 4)}


def by_category(
    texts: list[TracedText], questions: list[Question], heads: CerberusHeads, size: int
) -> dict[str, dict[str, float]]:
    tree, tallies = default_tree(heads, torch.device("cpu"), size), defaultdict[str, Tally](Tally)
    for text in texts:
        one = walk([text], tree, AlwaysOpen(), UNIT)
        for name in ("all", questions[text.question].category):
            tallies[name] += one
    return {name: rates(tally) for name, tally in tallies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", required=True, help="packaged names, folders or Hub ids")
    parser.add_argument("--tree-size", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--answers", type=Path, default=Path("answers.jsonl"), help="written where it is missing")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    model, tokenizer = cerberus_ext.load_default_model(getattr(torch, arguments.dtype), "cpu")
    questions = read_questions(arguments.questions)
    if not arguments.answers.exists():
        write_answers_file(arguments.answers, model, tokenizer, questions, arguments.new_tokens)
    answers = [answer for answer in read_answers(arguments.answers) if answer.new >= 2]
    for name in arguments.heads:
        heads = CerberusHeads.from_pretrained(name).to(model.dtype)
        texts = [trace(model, heads, answer) for answer in tqdm(answers, desc=Path(name).name, unit="answer")]
        config = heads.config
        shape = {key: getattr(config, key) for key in ("num_heads", "num_layers", "anchor", "chained", "draft_vocab")}
        for size in arguments.tree_size:
            found = by_category(texts, questions, heads, size)
            row = {
                "heads": Path(name).name, **shape, "tree_size": size, "texts": len(texts), "dtype": arguments.dtype,
                "date": datetime.date.today().isoformat(), "commit": commit(), "by_category": found,
            }  # fmt: skip
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{row['heads']}, {size} nodes: {found['all']}", flush=True)


if __name__ == "__main__":
    main()
