"""What a client may ask for: OpenAI's names; what would change an answer and is not there is refused by name."""

from __future__ import annotations

import secrets
from collections.abc import Container
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from ..engine.request import seed_of_row

MAX_CHOICES, MAX_STOPS, MAX_PROMPTS = 16, 16, 64
MAX_NAME = 64  # characters of an unknown field's, to be told
# fail_fast: a megabyte of wrong elements would be seconds of errors, of which one is told.
Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, fail_fast=True)]
# Of OpenAI's, with the only values that they may have here: with another one an answer would be another.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
_WITHOUT_EFFECT = ("metadata", "parallel_tool_calls", "prediction", "service_tier", "store", "user")


def _unknown(given: dict[str, Any], fields: Container[str]) -> str | None:
    """The first name that is not among the fields, if any, to be told."""
    name = next((name for name in given if name not in fields), None)
    return None if name is None else name[:MAX_NAME].encode(errors="replace").decode()


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False  # of no use here: there is none

    @model_validator(mode="before")
    @classmethod
    def _only_these(cls, given: Any) -> Any:
        if isinstance(given, dict) and (name := _unknown(given, cls.model_fields)) is not None:
            raise ValueError(f"stream_options: {name} is not known")
        return given


class Request(BaseModel):
    """What both kinds have. temperature: as OpenAI has it, 1 where none is given; 0: greedy."""

    model_config = ConfigDict(strict=True)
    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, lt=2**63)] = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = Field(default_factory=lambda: secrets.randbits(62))
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: Annotated[list[str], Field(fail_fast=True)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_what_is_not_there(cls, given: Any) -> Any:
        """null is what is not given."""
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None and name not in _WITHOUT_EFFECT}
        for name, allowed in _REFUSED.items():
            if name in given and given.pop(name) not in allowed:
                raise ValueError(f"{name}: is not supported")
        if (unknown := _unknown(given, cls.model_fields)) is not None:
            raise ValueError(f"{unknown}: is not known")
        return given

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: list[str]) -> list[str]:
        if len(stop) > MAX_STOPS or not all(stop):
            raise ValueError(f"must be at most {MAX_STOPS} texts that are not empty")
        return stop

    @property
    def top(self) -> int | None:
        """So many of the most probable tokens are to be named beside each; None: no log-probabilities."""
        raise NotImplementedError

    def options(self, choice: int) -> dict[str, Any]:
        """Of `decode`, for one of the n answers."""
        seed = seed_of_row(self.seed, choice)
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "seed": seed}
        return sampling if self.temperature else {}


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore")  # name, refusal: no template knows them
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates have it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0

    @model_validator(mode="before")
    @classmethod
    def _newer_name(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("max_completion_tokens") is not None:
            given = {**given, "max_tokens": given["max_completion_tokens"]}
            del given["max_completion_tokens"]
        return given

    @model_validator(mode="after")
    def _only_with_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs to be true")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(Request):
    """POST /v1/completions: one or several prompts, as text or as tokens."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int | None, Field(ge=0, le=5)] = None

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _of_one_kind(cls, prompt: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Not an error for each of the kinds."""
        try:
            return check(prompt)
        except ValidationError:
            kinds = f"a text, tokens from 0 to 2**63 - 1, at least one, or 1 to {MAX_PROMPTS} of either"
            raise ValueError(f"must be {kinds}") from None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[return-value]
