"""MT-Bench's first turns as prompts of a chat model, and results kept one JSON line each, so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase


def read_questions(file: Path, limit: int) -> list[tuple[int, str]]:
    """(question_id, first turn) of the first `limit` lines."""
    rows = [json.loads(line) for line in file.read_text().splitlines()[:limit]]
    return [(row["question_id"], row["turns"][0]) for row in rows]


def encode(tokenizer: PreTrainedTokenizerBase, question: str, device: str) -> Tensor:
    """(1, S) token ids, with the chat template."""
    messages = [{"role": "user", "content": question}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return encoded["input_ids"].to(device)


class Results:
    """A file of JSON lines, each with a `key`; what is in it already is not done again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        if file.exists():
            self.rows = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())}

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows.values())

    def add(self, key: str, **row: Any) -> None:
        self.rows[key] = {"key": key, **row}
        with self.file.open("a") as out:
            out.write(json.dumps(self.rows[key]) + "\n")
