"""The text that a decode generates: takes tokens as they are decided, hands them out, and knows where it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..io.checks import call

MAX_NEW_TOKENS = 256  # where nothing else is said
SLOTS = 8  # the same: texts at once

P = ParamSpec("P")
R = TypeVar("R")


def ends_streamer(function: Callable[P, R]) -> Callable[P, R]:
    """`streamer.end` is called once, however the function ends: whoever reads what is streamed waits for it.

    Where the function raises, that is what its caller gets, also if `end` raises, too.
    """

    @wraps(function)
    def wrapper(*arguments: P.args, **keywords: P.kwargs) -> R:
        end: Any = getattr(keywords.get("streamer"), "end", None)
        try:
            result = function(*arguments, **keywords)
        except BaseException:
            with suppress(Exception):
                if callable(end):
                    end()
            raise
        if callable(end):
            end()
        return result

    return wrapper


class GeneratedText:
    """Ends at the exact token at which `generate` would: an end-of-text token, the token limit or a stopping criterion.

    ids (1, S): the prompt. stopping_criteria: called as criterion(ids, None) with the text after every new token; None
    in the place of scores, as `generate` has it without output_scores. streamer: gets the prompt, then every token.
    stopped: it has ended by a token or a criterion.
    """

    def __init__(
        self,
        ids: Tensor,
        max_new_tokens: int,
        eos_token_ids: frozenset[int],
        stopping_criteria: Callable[[Tensor, Any], Tensor] | None,
        streamer: Any,
    ) -> None:
        self.prompt = ids
        self.tokens: list[int] = []
        self.remaining = max_new_tokens
        self.stopped = False
        self._eos_token_ids = eos_token_ids
        self._stopping_criteria = stopping_criteria
        self._streamer = streamer
        self._text = ids  # for the criteria, with room for more tokens: to copy all of it after each is quadratic

    @property
    def ended(self) -> bool:
        return self.remaining == 0 or self.stopped

    def begin(self) -> None:
        """Hands out the prompt: once everything that may be refused has been looked at."""
        if self._streamer is not None:
            call("decode: streamer.put", self._streamer.put, self.prompt.cpu())

    def add(self, tokens: list[int]) -> list[int]:
        """Takes the next tokens -> those it has taken; the ones after the end are dropped."""
        for taken, token in enumerate(tokens):
            if self.ended:
                return tokens[:taken]
            self.tokens.append(token)
            self.remaining -= 1
            if self._streamer is not None:
                call("decode: streamer.put", self._streamer.put, torch.tensor([token]))
            self.stopped = token in self._eos_token_ids or self._meets_criterion()
        return tokens

    def _meets_criterion(self) -> bool:
        if self._stopping_criteria is None:
            return False
        end = self.prompt.shape[1] + len(self.tokens)
        if end > self._text.shape[1]:
            self._text = torch.cat([self._text, torch.empty_like(self._text)], 1)
        self._text[0, end - 1] = self.tokens[-1]
        return bool(call("decode: stopping_criteria", self._stopping_criteria, self._text[:, :end], None).any())
