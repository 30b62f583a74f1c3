"""Prompts that a model writes itself: what its user would say, or, without a chat template, the beginning of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from ..io.prompts import encode_chat
from .sampler import Text

MARKER = "MARKER-OF-THE-USERS-TEXT"
CHAT_TOKENS = 128  # longest text of a user
BEGINNING = (8, 32)  # shortest and longest beginning of a text
TEMPERATURE, TOP_P = 1.0, 0.95


@dataclass
class PromptWriter:
    """How a model is made to write prompts.

    prefix: token ids that stand before a prompt. stop: tokens that end it. suffix: the text that ends it where the
    template has no token for that. chat: whether prompts are questions, or beginnings that are answered by going on.
    longest: tokens, prefix included, that a prompt may have when it is written.
    """

    tokenizer: PreTrainedTokenizerBase
    prefix: list[int]
    stop: frozenset[int]
    suffix: str
    chat: bool
    longest: int

    def texts(self, count: int, draw: numpy.random.Generator) -> list[Text]:
        """Prompts to be written, for `write_texts`."""
        longest = self.longest - len(self.prefix)
        shortest = longest if self.chat else min(BEGINNING[0], longest)
        lengths = draw.integers(shortest, longest, count, endpoint=True).tolist()
        noise = torch.from_numpy(draw.random((count, longest), dtype=numpy.float32))
        return [Text(self.prefix, TEMPERATURE, TOP_P, row[:length]) for row, length in zip(noise, lengths, strict=True)]

    def prompt(self, text: Text) -> list[int] | None:
        """What was written as token ids to answer; None where it is nothing to answer."""
        ended = text.new[-1] in self.stop
        if not self.chat:
            return None if ended else [*text.prompt, *text.new]
        said: Any = self.tokenizer.decode(text.new[:-1] if ended else text.new, skip_special_tokens=True)
        if self.suffix:
            said = said.partition(self.suffix)[0]
        said = said.strip()
        return encode_chat(self.tokenizer, [said])[0].tolist() if said else None


def prompt_writer(
    tokenizer: PreTrainedTokenizerBase, stop: frozenset[int], begin: int | None, room: int
) -> PromptWriter:
    """For a tokenizer with or without a chat template.

    stop: tokens that end the model's answers. begin: the token that begins a text, None where there is none. room:
    tokens that a prompt may have at most, with all of the template.
    Raises ValueError where the template hides what the user says, where nothing can be put before a prompt, or where
    there is no room for one.
    """
    if tokenizer.chat_template is None:
        if begin is None:
            raise ValueError("train: prompts must be given for a model whose tokenizer has no token that begins a text")
        return PromptWriter(tokenizer, [begin], stop, "", chat=False, longest=min(room, 1 + BEGINNING[1]))
    shown: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": MARKER}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = shown.partition(MARKER)
    prefix, end = (list(tokenizer(part, add_special_tokens=False).input_ids) for part in (before, after))
    if not found or not prefix:
        raise ValueError(
            "train: prompts must be given for a model whose chat template has nothing before the user's text"
        )
    around = len(prefix) + len(end)
    if around >= room:
        raise ValueError(f"train: the model must have room for a prompt beside {around} tokens of its chat template")
    suffix = after.strip()
    if end and end[0] in tokenizer.added_tokens_decoder:
        stop, suffix = stop | {end[0]}, ""
    longest = min(room - len(end), len(prefix) + CHAT_TOKENS)
    return PromptWriter(tokenizer, prefix, stop, suffix, chat=True, longest=longest)
