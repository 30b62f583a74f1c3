"""`cerberus generate --file`: every prompt is answered once, in order, as `decode` would alone; also on a cluster."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from ray_clusters import two_nodes
from serving_runs import tiny
from typer.testing import CliRunner

from cerberus_ext import decode
from cerberus_ext.cli import app
from cerberus_ext.serving.answerer import Answerer, in_order, one_by_one

QUESTIONS = [{"prompt": f"w{3 + i % 50} w{5 + i % 7}", "id": f"q{i}"} for i in range(64)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("file")
    tiny(folder)[1].save_pretrained(folder)  # with its template
    return folder


def run(folder: Path, questions: list[Any], *arguments: str) -> Any:
    (folder / "prompts.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    command = ["generate", "--file", str(folder / "prompts.jsonl"), "--model", str(folder), "--heads", "none"]
    command += ["--dtype", "float32"]
    return CliRunner().invoke(app, [*command, "--max-new-tokens", "12", *arguments])


def answers(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_as_decode_alone(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    chat = {"prompt": None, "messages": [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}]}
    questions = [*QUESTIONS[:20], chat, {"prompt": "w9 " * 300}, {"prompt": "w3", "messages": None}]
    result = run(folder, questions, "--output", str(out), "--slots", "3")
    assert result.exit_code == 1 and "[22 answered, 0 were there, 1 refused]" in result.output
    model, tokenizer = tiny(tmp_path)
    got = answers(out)
    for question, answer in zip(questions[:20], got, strict=False):
        ids = tokenizer(question["prompt"], return_tensors="pt").input_ids
        new = decode(model, None, ids, max_new_tokens=12).sequences[0, ids.shape[1] :]
        assert answer["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (answer["prompt_tokens"], answer["completion_tokens"]) == (ids.shape[1], len(new))
    assert [answer["id"] for answer in got] == [*(f"q{i}" for i in range(20)), 21, 22, 23]
    assert "the prompt must have 1 to 255 tokens, got 300" in got[21]["error"]


def test_what_is_answered_is_kept(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert run(folder, QUESTIONS[:8], "--output", str(whole)).exit_code == 0
    lines = whole.read_text().splitlines(keepends=True)
    for there in ([], lines[:3], lines):
        kept = [line.replace('"answer": "', '"answer": "kept ') for line in there]
        out.write_text("".join(kept) + (lines[3][:9] if there is not lines else ""))  # half a line
        result = run(folder, QUESTIONS[:8], "--output", str(out))
        assert f"[{8 - len(there)} answered, {len(there)} were there, 0 refused]" in result.output
        assert out.read_text() == "".join(kept + lines[len(there) :])


@pytest.mark.parametrize(
    ("questions", "there", "message"),
    [
        ([{"prompt": "w3"}], '{"id": "other"}\n', "--output: answers.jsonl line 1: must be the answer to 1, got"),
        ([{"prompt": "w3"}], '{"id": 1, "answer": ""}\n{"id": 2}\n', "line 2: must not be there, with 1 prompts"),
        ([{"prompt": "w3"}], '{"id": 1, "prompt": "w3"}\n', "line 1: must be the answer to 1, got"),
        ([{"prompt": "w3"}], '{"id": 1, "prompt": "w3"}', "answers.jsonl: the last line must be an answer, got"),
        ([{"prompt": "w3"}], '{"id": 12, "answer": "w', "the last line must be an answer, got"),
        ([{"prompt": "w3"}], '{"id": 1, "answer": ""}\n{', "the last line must be an answer, got b'{'"),
        ([{"prompt": "w3"}], "my notes", "the last line must be an answer, got b'my notes'"),
        ([{"prompt": "w3", "id": None}], '{"answer": ""}\n', "line 1: must be the answer to None, got"),
        ([{"prompt": ""}], "", '--file: prompts.jsonl line 1: must have "prompt", a text, or "messages"'),
        ([{"prompt": "w3", "messages": ["w3"]}], "", "--file: prompts.jsonl line 1"),
        ([{"messages": [3]}], "", '--file: prompts.jsonl line 1: must have "prompt"'),
        ([3], "", "--file: prompts.jsonl line 1"),
        (
            [{"prompt": "w3"}, {"prompt": "w3", "id": "\ud800"}],
            "",
            'line 2: "id" must be JSON of finite numbers and whole',
        ),
        ([{"prompt": "w3", "id": [float("nan")]}], "", 'prompts.jsonl line 1: "id" must be JSON of finite numbers'),
        ([{"prompt": "w3", "id": float("inf")}], "", 'line 1: "id" must be JSON of finite numbers'),
        ([], "", "--file: prompts.jsonl must have at least one prompt"),
    ],
)
def test_refused(folder: Path, tmp_path: Path, questions: list[Any], there: str, message: str) -> None:
    (tmp_path / "answers.jsonl").write_text(there)
    result = run(folder, questions, "--output", str(tmp_path / "answers.jsonl"))
    assert result.exit_code == 2 and message in result.output
    assert (tmp_path / "answers.jsonl").read_text() == there


def test_other_files_are_no_output(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.jsonl"
    link.symlink_to(folder / "prompts.jsonl")
    for output, message in (
        (link, "link.jsonl must be another file than that of the prompts"),
        (Path("/dev/full"), "full must be a regular file"),
        (folder, "must be a regular file"),
    ):
        result = run(folder, QUESTIONS[:2], "--output", str(output))
        assert result.exit_code == 2 and message in result.output
    assert link.read_text() == "".join(json.dumps(question) + "\n" for question in QUESTIONS[:2])


def test_goes_on_behind_an_error_and_an_id_that_is_null(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    questions = [{"prompt": "w9 " * 300, "id": None}, {"prompt": "w3", "id": None}, {"prompt": "w4", "id": [1, {}]}]
    assert run(folder, questions, "--output", str(out)).exit_code == 1
    lines = out.read_text().splitlines(keepends=True)
    for there in (lines[:1], [*lines[:2], lines[2][:20]], lines):
        out.write_text("".join(there))
        result = run(folder, questions, "--output", str(out))
        assert result.exit_code == 1 and ", 1 refused]" in result.output
        assert out.read_text() == "".join(lines)


def test_a_full_disk_is_gone_on_from(folder: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    assert run(folder, QUESTIONS[:8], "--output", str(whole)).exit_code == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (300, 500):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            result = run(folder, QUESTIONS[:8], "--output", str(out))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert result.exit_code == 2 and "cerberus: --output: File too large" in result.output
        assert out.read_bytes() == whole.read_bytes()[:size]
    assert run(folder, QUESTIONS[:8], "--output", str(out)).exit_code == 0
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("raw", [[], ["--raw"]])
def test_half_a_character_is_refused_alone(folder: Path, tmp_path: Path, raw: list[str]) -> None:
    out = tmp_path / "answers.jsonl"
    result = run(folder, [{"prompt": "w3"}, {"prompt": "w3 \ud800"}, {"prompt": "w4"}], "--output", str(out), *raw)
    assert result.exit_code == 1 and "[2 answered, 0 were there, 1 refused]" in result.output
    assert answers(out)[1] == {"id": 2, "error": "the prompt must be text, got '\\ud800', half of a character"}


def test_refused_options(folder: Path) -> None:
    assert "--output: must be given with --file" in run(folder, QUESTIONS[:1]).output
    assert "--file: cannot be had with PROMPT" in run(folder, QUESTIONS[:1], "--compare").output


def test_without_ray(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = run(folder, QUESTIONS[:1], "--output", str(tmp_path / "answers.jsonl"), "--ray", "auto")
    assert result.exit_code == 2 and '--ray: ray is missing: pip install "cerberus_ext[ray]"' in result.output


def test_in_order_and_no_more_than_each_worker_may_have() -> None:
    running = [0, 0]

    def worker(number: int) -> Any:
        async def ask(question: dict[str, Any]) -> dict[str, Any]:
            running[number] += 1
            assert running[number] <= 3
            await asyncio.sleep(0.02 if question["id"] % 5 == 0 else 0)
            running[number] -= 1
            if question["id"] == 33:
                raise MemoryError("no memory")
            return question

        return ask

    async def collect(count: int) -> list[int]:
        questions = [{"id": i} for i in range(count)]
        return [answer["id"] async for answer in in_order(questions, [worker(0), worker(1)], 3)]

    assert asyncio.run(collect(30)) == list(range(30))
    with pytest.raises(MemoryError):
        asyncio.run(collect(40))

    running[:] = 0, 0
    first = one_by_one(in_order(({"id": i} for i in itertools.count()), [worker(0)], 3))
    assert [next(first)["id"] for _ in range(8)] == list(range(8))
    first.close()


@pytest.mark.slow
def test_on_two_nodes_one_of_which_loses_its_replica(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cerberus_ext.serving import answerer

    died = tmp_path / "died"

    class Mortal(Answerer):
        async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
            if question["id"] == "q20" and not died.exists():
                died.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return {**await super().answer(question), "pid": os.getpid()}

    assert run(folder, QUESTIONS, "--output", str(tmp_path / "here.jsonl")).exit_code == 0
    monkeypatch.setattr(answerer, "Answerer", Mortal)
    with two_nodes(monkeypatch, tmp_path) as address:
        arguments = ["--ray", address, "--replicas", "2", "--slots", "2"]
        result = run(folder, QUESTIONS, "--output", str(tmp_path / "there.jsonl"), *arguments)
    assert result.exit_code == 0, result.output
    there = answers(tmp_path / "there.jsonl")
    left = {answer.pop("pid") for answer in there} - {int(died.read_text())}
    assert len(left) == 2  # the other one, and the successor
    assert there == answers(tmp_path / "here.jsonl")
