"""bench/acceptance.py counts what the ways of `cerberus bench` would count, without decoding."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import acceptance
import pytest
import torch

from cerberus_ext import CerberusHeads
from cerberus_ext.calibration.trace import TracedText, trace
from cerberus_ext.evaluation.ways import Context, built_in_ways
from cerberus_ext.io.default_model import load_model
from cerberus_ext.io.prompts import Question, read_questions

NEW = 40
SIZES = (2, 9, 32)


@pytest.fixture(scope="module")
def known(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Model, tokenizer, heads, questions and the file of the model's answers."""
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    heads, questions = CerberusHeads.from_pretrained(folder / "heads"), read_questions(folder / "questions.jsonl")
    file = tmp_path_factory.mktemp("acceptance") / "answers.jsonl"
    acceptance.write_answers_file(file, model, heads, tokenizer, questions, NEW)
    return {"model": model, "tokenizer": tokenizer, "heads": heads, "questions": questions, "file": file}


@pytest.fixture(scope="module")
def texts(known: dict[str, Any]) -> list[TracedText]:
    found = [one for one in acceptance.read_answers(known["file"]) if one.new >= 2]
    return [trace(known["model"], known["heads"], one) for one in found]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("way", acceptance.WAYS)
def test_it_counts_what_the_way_itself_counts(
    way: str, size: int, known: dict[str, Any], texts: list[TracedText]
) -> None:
    questions: list[Question] = known["questions"]
    context = Context(known["model"], known["tokenizer"], known["heads"], size)
    ways, _ = built_in_ways(context)
    run = next(one for one in ways if one.name == way).run
    steps, tokens, nodes, nothing = (defaultdict[str, int](int) for _ in range(4))
    for answer in acceptance.read_answers(known["file"]):
        generated, stats = run(answer.ids[:, : answer.prompt], NEW)
        assert stats is not None and generated == answer.ids[0, answer.prompt :].tolist()
        for category in ("all", questions[answer.question].category):
            steps[category] += stats.steps
            tokens[category] += len(generated) - 1
            nodes[category] += sum(count for count, _ in stats.trace)
            nothing[category] += stats.accepted_histogram[0]
    found = acceptance.by_category(texts, questions, way, acceptance.tree_of(way, context))
    assert set(found) == {"all", "first", "second"}
    for category, rates in found.items():
        assert rates == {
            "tokens_per_step": pytest.approx(tokens[category] / steps[category], abs=1e-4),
            "nodes_per_step": pytest.approx(nodes[category] / steps[category], abs=1e-4),
            "accept_nothing": pytest.approx(nothing[category] / steps[category], abs=1e-4),
        }
    assert 1 < found["all"]["nodes_per_step"] <= size and found["all"]["tokens_per_step"] > 1


def test_the_script(known: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        acceptance.cerberus_ext, "load_default_model", lambda dtype, device: (known["model"], known["tokenizer"])
    )
    arguments = ["--questions", folder / "questions.jsonl", "--answers", known["file"], "--out", tmp_path / "rows"]
    arguments += ["--heads", folder / "heads", folder / "medusa", "--tree-size", 4, 8]
    monkeypatch.setattr(sys, "argv", ["acceptance.py", *map(str, arguments)])
    acceptance.main()
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    ways = [(row["heads"], row["way"], row["tree_size"]) for row in rows]
    assert len(set(ways)) == len(ways) == 2 * (4 + 3), "suffix alone does not depend on the heads"
    assert [way for way in ways if way[1] == "suffix"] == [(None, "suffix", 4), (None, "suffix", 8)]
    assert {row["questions"] for row in rows} == {"questions.jsonl"}
