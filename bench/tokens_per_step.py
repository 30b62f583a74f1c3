"""Tokens a step of heads with dynamic trees, by a walk through the model's answers that takes the steps of `decode`.

    python bench/tokens_per_step.py --questions mt_bench.jsonl --answers answers.jsonl --out results.jsonl \\
        --heads smollm2-135m-instruct my-heads

No machine and no time matters. The answers are greedy, of the default model; they are written once, in bfloat16, to
--answers, {"question": number, "p": [prompt ids], "r": [answer ids]}, and read from there the next time. What the heads
draft at every place of them is computed in --dtype. Heads with conditional drafts are walked with and without them.
With --documents, {"r": [ids]} each, say answers that the model has written before, these draft, too.
A line of the results is one set of heads, one tree size, and the heads alone or with the text's past; `gain` is over
the first heads. Intervals: 95 %, by bootstrap over the questions.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]

import cerberus_ext
from cerberus_ext import AlwaysOpen, DocumentProposer, DynamicPolicy, SuffixProposer
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import Answer, TracedText, trace, write_answers
from cerberus_ext.calibration.walk import walk
from cerberus_ext.cli.shared import load_heads
from cerberus_ext.evaluation.bootstrap import bootstrap_interval, ratio_of_totals
from cerberus_ext.io.prompts import Question, read_questions

NEW_TOKENS = 256
NO_COSTS = StepCosts((1, 1024), (0,), (0.0,), ((0.0,), (0.0,)))  # nobody asks for the time
WAYS: dict[str, tuple[Any, ...] | None] = {"heads": (), "heads and suffix index": None}  # proposers
NO_HEADS = "none"  # the suffix index alone


def answers_of(file: Path, questions: list[Question], heads: Any) -> list[Answer]:
    """From the file, else written to it."""
    if not file.exists():
        model, tokenizer = cerberus_ext.load_default_model(torch.bfloat16)
        written = write_answers(model, heads, tokenizer, questions, NEW_TOKENS)
        with file.with_suffix(".partial").open("w") as opened:
            for answer in tqdm(written, desc="answers", unit="text"):
                ids = answer.ids[0].tolist()
                line = {"question": answer.question, "p": ids[: answer.prompt], "r": ids[answer.prompt :]}
                opened.write(json.dumps(line) + "\n")
        file.with_suffix(".partial").rename(file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    texts = [(line["question"], torch.tensor([line["p"] + line["r"]]), len(line["p"])) for line in lines]
    found = [Answer(*text, NEW_TOKENS) for text in texts if text[0] < len(questions)]
    return [answer for answer in found if answer.new > 1]


def counted(texts: list[TracedText], questions: int, size: int, proposers: Any) -> np.ndarray:
    """(Q, 4): of every question its tokens, steps, zero-accept steps and nodes."""
    totals = np.zeros((questions, 4))
    for text in texts:
        tally = walk([text], DynamicPolicy(size), AlwaysOpen(), NO_COSTS, proposers)
        totals[text.question] += tally.tokens, tally.steps, tally.zero_accept_steps, tally.nodes
    return totals


def rows_of(
    texts: dict[str, list[TracedText]], questions: list[Question], sizes: list[int], ways: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """A line for every way, size and set of heads."""
    categories = np.array([question.category for question in questions])
    asked = sorted({text.question for of_heads in texts.values() for text in of_heads})
    for way, proposers in ways.items():
        for size in sizes:
            first: np.ndarray | None = None
            for name, of_heads in texts.items():
                if name == NO_HEADS and proposers == ():
                    continue
                totals = counted(of_heads, len(questions), size, proposers)[asked]
                tokens, steps, zero, nodes = totals.sum(0).tolist()
                row: dict[str, Any] = {"heads": name, "way": way, "nodes": size, "questions": len(asked)}
                row |= {"texts": len(of_heads), "tokens_per_step": round(tokens / steps, 4)}
                row["interval"] = rounded(bootstrap_interval(per_step, totals))
                row |= {"zero_accept": round(zero / steps, 4), "nodes_per_step": round(nodes / steps, 2)}
                if first is None:
                    first = totals
                else:
                    pairs = np.concatenate([totals[:, :2], first[:, :2]], 1)
                    row["gain"] = round(float(ratio_of_totals(pairs)), 4)
                    row["gain_interval"] = rounded(bootstrap_interval(ratio_of_totals, pairs))
                parts = {category: totals[categories[asked] == category].sum(0) for category in np.unique(categories)}
                row["by_category"] = {str(part): round(float(of[0] / of[1]), 4) for part, of in parts.items() if of[1]}
                yield row


def per_step(rows: np.ndarray) -> np.ndarray:
    totals = rows.sum(-2)
    return totals[..., 0] / totals[..., 1]


def rounded(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [round(end, 4) for end in interval]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--answers", type=Path, required=True, help="written where it is not there")
    parser.add_argument("--heads", nargs="+", default=["smollm2-135m-instruct"], help="packaged names or folders")
    parser.add_argument("--documents", type=Path, help="JSON lines")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--limit", type=int, help="the first questions alone")
    parser.add_argument("--category", help="the questions of this category alone")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines")
    arguments = parser.parse_args()
    questions = read_questions(arguments.questions, arguments.limit)
    model, _ = cerberus_ext.load_default_model(getattr(torch, arguments.dtype))
    heads = {Path(name).name: load_heads(name, model) for name in arguments.heads}
    answers = [
        answer
        for answer in answers_of(arguments.answers, questions, next(iter(heads.values())))
        if arguments.category in (None, questions[answer.question].category)
    ]
    texts: dict[str, list[TracedText]] = {}
    for name, own in heads.items():
        traced = [trace(model, own, answer) for answer in tqdm(answers, desc=name, unit="text")]
        if own.conditional is not None:
            texts[f"{name}, without conditional drafts"] = [replace(text, conditional=None) for text in traced]
        texts[name] = traced
    texts[NO_HEADS] = [
        replace(text, ids=text.ids[..., :0], logprobs=text.logprobs[..., :0], conditional=None)
        for text in next(iter(texts.values()))
    ]
    ways = dict(WAYS)
    if arguments.documents is not None:
        documents = [json.loads(line)["r"] for line in arguments.documents.read_text().splitlines()]
        ways["heads, suffix index and documents"] = (SuffixProposer(), DocumentProposer(documents))
    facts = {"source": arguments.questions.name, "dtype": arguments.dtype, "date": date.today().isoformat()}
    with arguments.out.open("w") as file:
        for row in rows_of(texts, questions, arguments.sizes, ways):
            file.write(json.dumps(facts | row) + "\n")
            file.flush()
            print(f"{row['heads']}, {row['way']}, {row['nodes']} nodes: {row['tokens_per_step']}", flush=True)


if __name__ == "__main__":
    main()
