"""The answers for other trainers of drafters, vLLM's speculators and SpecForge: JSON lines of `input_ids` and
`loss_mask`.

A file that is there already is never written over. One that holds the same rows is left as it is, so that the same
command can be given again.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..io.files import check_writable, write_text
from .answers import Answers

KEYS = ("input_ids", "loss_mask")


def check_export(file: Path) -> None:
    """Before the answers are there. Raises ValueError where the file cannot be one of them, OSError where it cannot be
    written."""
    if not file.exists():
        return check_writable("train: export_dataset", file.parent)
    try:
        with file.open("rb") as opened:
            first = json.loads(opened.readline())
    except (IsADirectoryError, ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or tuple(first) != KEYS:
        raise ValueError(f"train: export_dataset: {file} is there already, and holds no such rows; choose another file")


def export_dataset(answers: Answers, file: Path) -> None:
    """A row for every answer: prompt and answer, and 1 for each token that the model wrote, else 0.

    Raises ValueError where the file is there and holds something else, OSError where it cannot be written.
    """
    rows = []
    for line in answers.lines:
        ids, mask = [*line.prompt, *line.answer], [0] * len(line.prompt) + [1] * len(line.answer)
        rows.append(json.dumps(dict(zip(KEYS, (ids, mask), strict=True))) + "\n")
    text = "".join(rows)
    if file.exists():
        if file.read_bytes() != text.encode():
            raise ValueError(f"train: export_dataset: {file} is there already, with other rows; choose another file")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text)
