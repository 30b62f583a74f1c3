"""Prompts from a file, and the file of their answers, which may be there in part."""

from __future__ import annotations

import json
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
        if len(found) != 1 or not (_are_messages(found[0]) if "messages" in line else isinstance(found[0], str)):
            got = json.dumps(line)[:40]
            raise ValueError(f'{where}: must have "prompt", a text, or "messages" of texts, got {got!r}')
        questions.append({"id": line.get("id", int(where.rsplit(" ", 1)[1])), "prompt": found[0]})
    if not questions:
        raise ValueError(f"{path.name} must have at least one prompt, got none")
    return questions


def answered(path: Path, questions: list[dict[str, Any]]) -> int:
    """How many of the questions have an answer in the file, which is made where it is not there.

    A last line without an end is cut off: whoever wrote it was stopped. Raises ValueError, naming the line, where the
    file has other answers.
    """
    with path.open("ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    count = 0
    for where, line in read_json_lines(path):
        expected = questions[count]["id"] if count < len(questions) else None
        if not isinstance(line, dict) or expected is None or line.get("id") != expected:
            raise ValueError(f"{where}: must be the answer to {expected!r}, got {json.dumps(line)[:40]!r}")
        count += 1
    return count


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        for message in value
    )
