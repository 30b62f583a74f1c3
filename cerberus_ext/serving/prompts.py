"""Prompts as clients give them -> tokens."""

from __future__ import annotations

import asyncio
import copy
import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.model_files import first_line
from ..io.prompts import encode_messages
from .engine import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def positions_of(model: PreTrainedModel) -> int:
    """Tokens that a prompt and its answer may have together."""
    config: Any = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or 1 << 20


class Prompts:
    """Encoded one by one by a thread of their own: a long one does not hold up the streams of others."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int) -> None:
        self._tokenizer = copy.deepcopy(tokenizer)  # another thread decodes with the first one
        self._positions = positions
        self._thread = ThreadPoolExecutor(1, "cerberus prompts")

    async def encode(self, prompt: list[dict[str, str]] | str | list[int]) -> Tensor:
        """Messages of a chat, a text, or tokens -> (1, S). Raises Refused."""
        ids = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, prompt)
        if not 1 <= ids.shape[1] < self._positions:
            raise Refused(f"the prompt must have 1 to {self._positions - 1} tokens, got {ids.shape[1]}")
        return ids

    def _encode(self, prompt: Any) -> Tensor:
        if not isinstance(prompt, str) and isinstance(prompt[0], int):
            return torch.tensor([prompt])
        try:
            json.dumps(prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Refused(f"the prompt must be text, got {error.object[error.start]!r}, half of a character") from None
        if isinstance(prompt, str):
            return self._tokenizer(prompt, return_tensors="pt").input_ids.to(torch.int64)
        if self._tokenizer.chat_template is None:
            raise Refused("messages: the model has no chat template: give the prompt as a text")
        try:
            return encode_messages(self._tokenizer, prompt)
        except Exception as error:  # a template may raise what it likes: "roles must alternate"
            raise Refused(f"messages: {first_line(str(error))}") from error
