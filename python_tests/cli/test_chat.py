"""`cerberus chat`, with a conversation that is piped in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import save_heads, save_model
from typer.testing import CliRunner, Result

from cerberus_ext.cli.main import app
from cerberus_ext.runtime.stepper import Stepper

LINE = re.compile(r"\[(\d+) tokens, [\d.]+ tokens/s, [\d.]+ tokens per step, (\d+) of (\d+) prompt tokens reused\]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    save_model(folder / "model", seed=1)  # its answers are words alone: special tokens are not said again
    save_heads(folder / "heads")
    return folder


def chat(folder: Path, said: str, heads: str | None = None) -> Result:
    command = ["chat", "--model", str(folder / "model"), "--heads", heads or str(folder / "heads")]
    return CliRunner().invoke(app, [*command, "--max-new-tokens", "12"], input=said)


def numbers(result: Result) -> list[tuple[int, ...]]:
    """Of every answer: its tokens, those of its prompt that were reused, all of its prompt."""
    assert result.exit_code == 0, result.output
    return [tuple(map(int, found)) for found in LINE.findall(result.stdout)]


@pytest.mark.parametrize("heads", [None, "none"])
def test_every_turn_reads_what_is_new(folder: Path, heads: str | None) -> None:
    first, second, third = numbers(chat(folder, "w3 w4\nw5\n\n  w6 w7 \n", heads))
    assert first == (12, 0, 2)
    assert second == (12, 2 + 11, 2 + 12 + 1)  # the last token of an answer is not read before the next turn
    assert third == (12, second[2] + 11, second[2] + 12 + 2)


def test_answers_are_those_of_generate(folder: Path) -> None:
    lines = chat(folder, "w3 w4\n").stdout.splitlines()
    names = ["--model", str(folder / "model"), "--heads", str(folder / "heads"), "--max-new-tokens", "12"]
    assert lines[0] == CliRunner().invoke(app, ["generate", *names, "w3 w4"]).stdout.splitlines()[0]
    assert len(lines) == 2 and LINE.fullmatch(lines[1])


@pytest.mark.parametrize("said", ["", "\n", "exit\nw3\n"])
def test_nothing_is_said(folder: Path, said: str) -> None:
    assert numbers(chat(folder, said)) == []


def test_other_bytes(folder: Path) -> None:
    command = ["chat", "--model", str(folder / "model"), "--heads", "none"]
    result = CliRunner().invoke(app, command, input=b"w3 \xff\n")
    assert (result.exit_code, result.stderr) == (2, "cerberus: standard input: must be UTF-8 text\n")


def test_an_interrupt_ends_the_answer_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, steps = Stepper.begin, []

    def interrupted(*arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return begin(*arguments)

    monkeypatch.setattr(Stepper, "begin", interrupted)
    first, second = numbers(chat(folder, "w3 w4\nw5\n"))
    assert 2 <= first[0] < 12 and second == (12, 2 + first[0] - 1, 2 + first[0] + 1)
