"""Answers of the target model as token ids: what heads are trained on."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..io.files import read_json_lines, sha256


@dataclass
class Answer:
    """A line of the data: token ids of prompt and answer, and the temperature it was sampled at."""

    prompt: Sequence[int]
    answer: Sequence[int]
    temperature: float | None

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.prompt) + len(self.answer)

    def json(self) -> str:
        """As a line of a file, which `read_answers` reads."""
        return json.dumps({"p": list(self.prompt), "r": list(self.answer), "t": self.temperature})


@dataclass
class Answers:
    """All of the data: its lines, and the sha256 of the files they come from."""

    lines: list[Answer]
    sha256: str

    def describe(self) -> dict[str, int | str]:
        """For the record."""
        return {
            "sha256": self.sha256,
            "lines": len(self.lines),
            "prompt_tokens": sum(len(line.prompt) for line in self.lines),
            "answer_tokens": sum(len(line.answer) for line in self.lines),
        }


def read_answers(files: Iterable[Path], vocab_size: int) -> Answers:
    """Reads JSONL of {"p": [ids], "r": [ids], "t": temperature (optional)}; names the line that is wrong."""
    files = list(files)
    lines = [line for file in files for line in parse_answers(file, vocab_size)]
    if not lines:
        raise ValueError(f"train: {files[0].name} must have at least one line, got none")
    return Answers(lines, sha256(files))


def parse_answers(path: Path, vocab_size: int) -> list[Answer]:
    """The lines of one file; none is fine here."""
    answers = []
    for where, line in read_json_lines(path, "train: "):
        if not isinstance(line, dict):
            raise ValueError(f"{where}: must be an object, got {type(line).__name__}")
        for key in ("p", "r"):
            ids = line.get(key)
            if not isinstance(ids, list) or not ids:
                raise ValueError(f'{where}: "{key}" must be a list of at least one token id, got {ids!r}')
            for token in ids:
                if type(token) is not int or not 0 <= token < vocab_size:
                    raise ValueError(f'{where}: "{key}" must hold ids in 0..{vocab_size - 1}, got {token!r}')
        temperature = line.get("t")
        if temperature is not None and (type(temperature) not in (int, float) or not temperature >= 0):
            raise ValueError(f'{where}: "t" must be a temperature >= 0, got {temperature!r}')
        answers.append(Answer(array("i", line["p"]), array("i", line["r"]), temperature))
    return answers
