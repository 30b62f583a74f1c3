"""Questions from a file, and as a chat model wants to be asked them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .files import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """What a user asks, in one turn or in several. category: "" where the file names none."""

    id: str
    category: str
    turns: tuple[str, ...]


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Reads JSON lines: MT-Bench's {"question_id", "category", "turns": [...]} or {"prompt": "..."}.

    limit: at most so many, from the beginning; None: all. A line without a question_id is known by its number.
    Raises ValueError, naming the line, on anything else, and on a file without a question.
    """
    questions: list[Question] = []
    for where, line in read_json_lines(path):
        if len(questions) == limit:
            break
        turns = line.get("turns", [line.get("prompt")]) if isinstance(line, dict) else None
        if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
            raise ValueError(
                f'{where}: must have "turns", a list of texts, or "prompt", a text, got {json.dumps(line)[:40]!r}'
            )
        identity = str(line.get("question_id", where.rsplit(" ", 1)[1]))
        questions.append(Question(identity, str(line.get("category", "")), tuple(turns)))
    if not questions:
        raise ValueError(f"{path.name} must have at least one question, got none")
    return questions


def encode_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[str]) -> Tensor:
    """Token ids (1, S) of a conversation, up to where the model has to answer.

    turns: what was said, user and assistant taking turns, the user first and last. With the tokenizer's chat template;
    without one the turns are joined as plain text.
    """
    if len(turns) % 2 == 0:
        raise ValueError(f"encode_chat: turns must begin and end with the user's, got {len(turns)} turns")
    if tokenizer.chat_template is None:
        return tokenizer("\n\n".join(turns), return_tensors="pt").input_ids
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return encode_messages(tokenizer, messages)


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> Tensor:
    """As `encode_chat`, of messages as the tokenizer's chat template has them. Raises what the template likes."""
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    return encoded.input_ids
