"""Tokens a step over questions, by category, without decoding: what heads and the text's own past are worth.

    python bench/acceptance.py --questions mt_bench.jsonl --heads smollm2-135m-instruct my-heads --out acceptance.jsonl

The model writes its greedy answers once, both turns, into `--answers`. One pass over an answer tells what heads draft
at every place, and a walk through it takes the steps that `decode` would take (calibration/walk.py), so the numbers are
those of `cerberus bench --tree-size N`, in a fraction of the time. One row is added to `--out` for each heads, way and
size; the ways are those of that command, see evaluation/ways.py. Where a calibration is stored with the heads, it says
how their probabilities are corrected, as there.

    tokens_per_step   the last step of a text counts as far as the text goes
    nodes_per_step    that a forward checks, the root included; at most the size
    accept_nothing    share of all steps that gain one token, those without a draft among them
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import cerberus_ext
from cerberus_ext import AlwaysOpen, CerberusHeads, StaticPolicy
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import Answer, TracedText, trace, write_answers
from cerberus_ext.calibration.walk import Tally, walk
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.proposers import ProposerFactory
from cerberus_ext.evaluation.ways import BOTH, DYNAMIC, STATIC, SUFFIX, Context
from cerberus_ext.io.files import read_json_lines
from cerberus_ext.io.machine import commit
from cerberus_ext.io.prompts import Question, read_questions

UNIT = StepCosts((1, 1 << 20), (1,), ((1.0,), (1.0,)), ((1.0,), (1.0,)))  # every step takes one second
SHAPE = ("num_heads", "num_layers", "anchor", "chained", "context_layer", "draft_vocab")
WAYS = (STATIC, DYNAMIC, SUFFIX, BOTH)


def read_answers(file: Path) -> list[Answer]:
    return [
        Answer(line["question"], torch.tensor([line["ids"]]), line["prompt"], line["most"])
        for _, line in read_json_lines(file)
    ]


def write_answers_file(
    file: Path, model: Any, heads: CerberusHeads, tokenizer: Any, questions: Sequence[Question], new_tokens: int
) -> None:
    """heads: any, the answers are the model's."""
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as out:
        answers = write_answers(model, heads, tokenizer, questions, new_tokens)
        for answer in tqdm(answers, total=sum(len(question.turns) for question in questions), unit="answer"):
            row = {"question": answer.question, "prompt": answer.prompt, "most": answer.most}
            out.write(json.dumps({**row, "ids": answer.ids[0].tolist()}) + "\n")
    partial.replace(file)


def rates(tally: Tally) -> dict[str, float]:
    nothing = tally.accepted[0] / tally.steps if tally.steps else 0.0
    found = {
        "tokens_per_step": tally.tokens_per_step,
        "nodes_per_step": tally.nodes_per_step,
        "accept_nothing": nothing,
    }
    return {name: round(value, 4) for name, value in found.items()}


def tree_of(way: str, context: Context) -> StaticPolicy | DynamicPolicy:
    """The one that `cerberus bench` runs the way with."""
    if way == STATIC:
        return context.tree(context.heads)
    return context.suffix_tree() if way == SUFFIX else context.dynamic_tree()


def by_category(
    texts: Sequence[TracedText], questions: Sequence[Question], way: str, tree: StaticPolicy | DynamicPolicy
) -> dict[str, dict[str, float]]:
    """What `way` comes to with a tree. texts: traced with its heads."""
    proposers: list[ProposerFactory] | None = [] if way == DYNAMIC else None
    tallies = defaultdict[str, Tally](Tally)
    for text in texts:
        one = walk([text.without_heads() if way == SUFFIX else text], tree, AlwaysOpen(), UNIT, proposers)
        for name in ("all", questions[text.question].category):
            tallies[name] += one
    return {name: rates(tally) for name, tally in tallies.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--heads", nargs="+", required=True, help="packaged names, folders or Hub ids")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--tree-size", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--answers", type=Path, default=Path("answers.jsonl"), help="written where it is missing")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    model, tokenizer = cerberus_ext.load_default_model(getattr(torch, arguments.dtype), "cpu")
    questions = read_questions(arguments.questions)
    if not arguments.answers.exists():
        any_heads = CerberusHeads.from_pretrained(arguments.heads[0]).to(model.dtype)
        write_answers_file(arguments.answers, model, any_heads, tokenizer, questions, arguments.new_tokens)
    answers = [answer for answer in read_answers(arguments.answers) if answer.new >= 2]
    for number, name in enumerate(arguments.heads):
        heads = CerberusHeads.from_pretrained(name).to(model.dtype)
        texts = [trace(model, heads, answer) for answer in tqdm(answers, desc=Path(name).name, unit="answer")]
        config = heads.config
        shape = {key: getattr(config, key) for key in SHAPE}
        for way, size in product(arguments.ways, arguments.tree_size):
            if way == SUFFIX and number:
                continue  # the same, whatever the heads are
            about = {"heads": None} if way == SUFFIX else {"heads": Path(name).name, **shape}
            tree = tree_of(way, Context(model, tokenizer, heads, size))
            found = by_category(texts, questions, way, tree)
            row = {
                "questions": arguments.questions.name, "way": way, "tree_size": size, **about, "texts": len(texts),
                "platt": getattr(tree, "platt", None),
                "dtype": arguments.dtype, "device": "cpu", "date": datetime.date.today().isoformat(),
                "commit": commit(), "by_category": found,
            }  # fmt: skip
            with arguments.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{row['heads']}, {way}, {size} nodes: {found['all']}", flush=True)


if __name__ == "__main__":
    main()
