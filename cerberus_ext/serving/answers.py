"""What a client gets: OpenAI's objects, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .choice import Choice, Piece
from .logprobs import Entry, of_chat, of_completion


@dataclass(frozen=True)
class Kind:
    """Of answers: their names, how they have log-probabilities, and where a choice has its text. None: it stands in the
    choice itself."""

    prefix: str
    whole: str
    part: str
    logprobs: Callable[[Sequence[Entry]], dict[str, Any]]
    text: tuple[str, str] | None  # in a whole answer, in a part of one

    def put(self, text: str, part: bool, begins: bool = False) -> dict[str, Any]:
        if self.text is None:
            return {"text": text}
        role = {"role": "assistant"} if begins or not part else {}
        return {self.text[part]: {**role, "content": text}}


CHAT = Kind("chatcmpl", "chat.completion", "chat.completion.chunk", of_chat, ("message", "delta"))
COMPLETION = Kind("cmpl", "text_completion", "text_completion", of_completion, None)


@dataclass
class Answer:
    """To one request, of so many choices."""

    kind: Kind
    model: str
    choices: list[Choice]
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.id = f"{self.kind.prefix}-{uuid.uuid4().hex}"

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(i, self.kind.put(c.text, False), c.finish, c.entries if c.logprobs else None)
            for i, c in enumerate(self.choices)
        ]
        return {**self._head(self.kind.whole), "choices": choices, "usage": usage(self.choices)}

    def part(self, index: int, piece: Piece, begins: bool = False) -> dict[str, Any]:
        """Of one choice: what follows."""
        choice = self._choice(index, self.kind.put(piece.text, True, begins), None, piece.entries or None)
        return {**self._head(self.kind.part), "choices": [choice]}

    def last_part(self, index: int) -> dict[str, Any]:
        """Why nothing follows."""
        put = self.kind.put("", True) if self.kind.text is None else {"delta": {}}
        return {**self._head(self.kind.part), "choices": [self._choice(index, put, self.choices[index].finish)]}

    def usage_part(self) -> dict[str, Any]:
        return {**self._head(self.kind.part), "choices": [], "usage": usage(self.choices)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(
        self, index: int, put: dict[str, Any], finish: str | None, entries: Sequence[Entry] | None = None
    ) -> dict[str, Any]:
        logprobs = None if entries is None else self.kind.logprobs(entries)
        return {"index": index, **put, "logprobs": logprobs, "finish_reason": finish}


def usage(choices: Iterable[Choice]) -> dict[str, Any]:
    """Tokens of the prompts and of the answers, and how many of these were drafted and right, or wrong."""
    choices = list(choices)
    prompts = {id(choice.ids): choice.ids.shape[1] for choice in choices}  # the n answers to a prompt share it
    prompt, answer = sum(prompts.values()), sum(choice.tokens for choice in choices)
    accepted, drafted = sum(choice.accepted for choice in choices), sum(choice.drafted for choice in choices)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(choice.reused for choice in choices)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
