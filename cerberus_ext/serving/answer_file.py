"""Prompts from a file, and the file of their answers, which may be there in part."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..io.files import read_json_lines


def read_questions(path: Path) -> list[dict[str, Any]]:
    """JSON lines, {"prompt": text} or {"messages": [...]} each, with an "id", or known by its line.

    Raises ValueError, naming the line, on anything else, OSError where the file cannot be read.
    """
    questions = []
    for where, line in read_json_lines(path):
        found = [line[name] for name in ("prompt", "messages") if line.get(name)] if isinstance(line, dict) else []
        if len(found) != 1 or not (_are_messages(found[0]) if line.get("messages") else isinstance(found[0], str)):
            got = json.dumps(line)[:40]
            raise ValueError(f'{where}: must have "prompt", a text, or "messages" of texts, got {got!r}')
        identity = line.get("id", int(where.rsplit(" ", 1)[1]))
        try:
            json.dumps(identity, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:  # it could not be written, or not be found again
            got = json.dumps(identity)[:40]
            raise ValueError(f'{where}: "id" must be JSON of finite numbers and whole characters, got {got}') from None
        questions.append({"id": identity, "prompt": found[0]})
    if not questions:
        raise ValueError(f"{path.name} must have at least one prompt, got none")
    return questions


def answered(path: Path, questions: list[dict[str, Any]], prompts: Path) -> tuple[int, int]:
    """How many of the questions the file has answers to, and how many of these are errors; (0, 0): it is not there.

    A last line without an end is cut off where it is the beginning of the next answer: whoever wrote it was stopped.
    prompts: the file of the questions. Raises ValueError, naming the line, where the file is anything else than answers
    to them, in order, and then has changed nothing.
    """
    if not path.exists():
        return 0, 0
    if not path.is_file():
        raise ValueError(f"{path.name} must be a regular file")
    if path.samefile(prompts):
        raise ValueError(f"{path.name} must be another file than that of the prompts")
    count = errors = 0
    for where, line in read_json_lines(path, ended=True):
        if count == len(questions):
            raise ValueError(f"{where}: must not be there, with {count} prompts, got {json.dumps(line)[:40]!r}")
        expected = questions[count]["id"]
        if not isinstance(line, dict) or ("id", expected) not in line.items() or not {"answer", "error"} & {*line}:
            raise ValueError(f"{where}: must be the answer to {expected!r}, got {json.dumps(line)[:40]!r}")
        count, errors = count + 1, errors + ("error" in line)
    content = path.read_bytes()
    tail = content.rpartition(b"\n")[2]
    if tail and (count == len(questions) or not _begins_answer(tail, questions[count]["id"])):
        raise ValueError(f"{path.name}: the last line must be an answer, got {tail[:40]!r}")
    os.truncate(path, len(content) - len(tail))
    return count, errors


def line_of(answer: dict[str, Any]) -> bytes:
    """The answer's line in the file."""
    return json.dumps(answer, ensure_ascii=False).encode() + b"\n"


def _begins_answer(tail: bytes, expected: Any) -> bool:
    """Whether `line_of` may have written this of an answer or an error, and then have been stopped."""
    starts = [line_of({"id": expected, name: ""}).removesuffix(b'"}\n') for name in ("answer", "error")]
    return any(tail.startswith(start) or start.startswith(tail) for start in starts)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
