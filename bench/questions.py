"""MT-Bench's first turns as prompts of a chat model, and results kept one JSON line each, so that a run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

# For where no file of questions is at hand: of MT-Bench's kinds.
OWN_QUESTIONS = (
    "Write a short letter to a neighbour, asking them to water your plants while you are away for two weeks.",
    "Explain to a ten-year-old, step by step, how a bicycle stays upright while it is moving.",
    "A shop sells pens at 3 for 2 euros and notebooks at 1.50 euros each. How much do 12 pens and 4 notebooks cost?",
    "Write a Python function that returns the longest common prefix of a list of strings, and explain how it works.",
    "List the main causes of the fall of the Western Roman Empire, with one sentence about each.",
    "Describe the taste and the smell of freshly baked bread to someone who has never had any.",
    "What are the advantages and disadvantages of working from home? Give a balanced answer and a recommendation.",
    "Summarize how vaccines train the immune system, and why some of them need a second dose.",
)


def questions_of(file: Path | None, limit: int) -> list[str]:
    """The first `limit` questions of the file, or of our own."""
    if file is None:
        return list(OWN_QUESTIONS[:limit])
    return [question for _, question in read_questions(file, limit)]


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
