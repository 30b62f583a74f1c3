"""The text that a decode generates: takes tokens as they are decided, hands them out, and knows where it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class GeneratedText:
    """Ends at the exact token at which `generate` would: an end-of-text token, the token limit or a stopping criterion.

    ids (1, S): the prompt. stopping_criteria: called as criterion(ids, None) with the text after every new token.
    streamer: gets the prompt, then every token, then `end`.
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
        self._eos_token_ids = eos_token_ids
        self._stopping_criteria = stopping_criteria
        self._streamer = streamer
        if streamer is not None:
            streamer.put(ids.cpu())

    @property
    def ended(self) -> bool:
        return self.remaining == 0

    def add(self, tokens: list[int]) -> list[int]:
        """Takes the next tokens -> those it has taken; the ones after the end are dropped."""
        for taken, token in enumerate(tokens):
            if self.ended:
                return tokens[:taken]
            self.tokens.append(token)
            self.remaining -= 1
            if self._streamer is not None:
                self._streamer.put(torch.tensor([token]))
            if token in self._eos_token_ids or self._is_stopped():
                self.remaining = 0
        return tokens

    def finish(self) -> Tensor:
        """The prompt and the new tokens, (1, S)."""
        if self._streamer is not None:
            self._streamer.end()
        return self._sequences()

    def _sequences(self) -> Tensor:
        return torch.cat([self.prompt, self.prompt.new_tensor([self.tokens])], dim=1)

    def _is_stopped(self) -> bool:
        if self._stopping_criteria is None:
            return False
        return bool(self._stopping_criteria(self._sequences(), None).any())
