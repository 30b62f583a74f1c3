"""bench/tokens_per_step.py on texts whose steps can be told without it, and bench/questions.py."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cerberus_ext.calibration.trace import TracedText
from cerberus_ext.io.prompts import Question, read_questions

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))  # last: bench/batches.py is no helper

import questions as sources  # noqa: E402
import tokens_per_step as bench  # noqa: E402


def a_text(question: int, right: bool) -> TracedText:
    """Nine places behind a prompt of one token, at which two heads draft one token each, always right or never."""
    tokens = list(range(1, 12))
    ahead = torch.arange(9)[:, None] + torch.arange(2, 4)  # the tokens behind the pending one
    ids = (ahead + 1).clamp(max=11) if right else torch.full_like(ahead, 40)
    shape = torch.full((9, 2, 1), -0.1)
    return TracedText(
        question=question, prompt=1, deepest=[max(0, 8 - place) for place in range(9)], ranks=[[0, 0]] * 9,
        hidden=torch.zeros(9, 4), entropy=[0.0] * 9, next_entropy=[0.0] * 9, ids=ids[:, :, None], logprobs=shape,
        conditional=None, tokens=tokens, vocabulary=50, agreeing=1.0,
    )  # fmt: skip


def test_tokens_a_step_and_gains() -> None:
    asked = [Question("1", "facts", ("?",)), Question("2", "prose", ("?",))]
    texts = {name: [a_text(number, right) for number in range(2)] for name, right in (("no", False), ("yes", True))}
    texts[bench.NO_HEADS] = [
        replace(text, ids=text.ids[..., :0], logprobs=text.logprobs[..., :0]) for text in texts["no"]
    ]
    rows = list(bench.rows_of(texts, asked, [3], bench.WAYS))
    assert [(row["heads"], row["way"]) for row in rows[:2]] == [("no", "heads"), ("yes", "heads")]
    assert [row["tokens_per_step"] for row in rows[:2]] == [1.0, 3.0]
    assert [row["zero_accept"] for row in rows[:2]] == [0.8889, 0.0]  # the last step drafts nothing
    assert rows[1]["gain"] == 3.0 and rows[1]["gain_interval"] == [3.0, 3.0] and "gain" not in rows[0]
    assert rows[1]["by_category"] == {"facts": 3.0, "prose": 3.0} and rows[1]["interval"] == [3.0, 3.0]
    assert [row["heads"] for row in rows[2:]] == ["no", "yes", bench.NO_HEADS]


def test_question_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "summaries.jsonl"
    monkeypatch.setattr(sys, "argv", ["questions.py", "summaries", "--out", str(file)])
    sources.main()
    found = read_questions(file)
    assert len(found) == sources.SUMMARIES and {question.category for question in found} == {"summaries"}
    tasks = read_questions(BENCH / "tasks.jsonl")
    counts = [sum(question.category == name for question in tasks) for name in ("translation", "mathematics")]
    assert counts == [40, 40] and len({question.turns for question in tasks}) == len(tasks) == 120
    assert all(json.loads(line)["turns"] for line in (BENCH / "tasks.jsonl").read_text().splitlines())
