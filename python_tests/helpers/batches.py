"""Prompts of several lengths, what each of them is answered alone, and proposers that know all answers."""

from __future__ import annotations

from typing import Any

import torch
from proposer_stand_ins import KnowingMaker, KnowingProposer, anything, right
from tiny_models import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import AlwaysClosed, CerberusConfig, CerberusHeads, decode
from cerberus_ext.drafting.proposers import ProposerFactory

NEW = 14


def prompts(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(VOCAB, (1, length), generator=generator) for length in lengths]


def alone(model: PreTrainedModel, rows: list[Tensor], **options: Any) -> list[Tensor]:
    """Of each row the whole text, (1, S), without drafts."""
    seed = options.pop("seed", 0)
    return [
        decode(model, None, row, max_new_tokens=NEW, gate=AlwaysClosed(), seed=seed + number, **options).sequences
        for number, row in enumerate(rows)
    ]


def texts_of(sequences: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """What a decode of prompts of several lengths returns -> each row's text."""
    longest = max(row.shape[1] for row in rows)
    return [part[None, longest - row.shape[1] :] for part, row in zip(sequences, rows, strict=True)]


class KnowingBatch:
    """A maker of proposers that finds its text by its prompt."""

    def __init__(self, texts: list[Tensor], answer: Any) -> None:
        self.texts, self.answer = texts, answer

    def __call__(self, prompt: list[int]) -> KnowingProposer:
        own = next(text for text in self.texts if text[0, : len(prompt)].tolist() == prompt)
        return KnowingMaker(own, self.answer)(prompt)


def proposers_of(kind: str, texts: list[Tensor]) -> list[ProposerFactory] | None:
    answers = {"oracle": right(), "random": anything(VOCAB)}
    return [KnowingBatch(texts, answers[kind])] if kind in answers else [] if kind == "none" else None


def plain_heads(model: Any, dtype: torch.dtype) -> CerberusHeads:
    """Without a context layer."""
    heads = CerberusHeads(CerberusConfig("tiny", model.get_input_embeddings().weight.shape[1], VOCAB, num_heads=3))
    for parameter in heads.requires_grad_(False).parameters():
        parameter.normal_(std=0.2)
    return heads.to(dtype).eval()


def equal(found: list[Tensor], want: list[Tensor]) -> None:
    for row, (ours, theirs) in enumerate(zip(found, want, strict=True)):
        assert ours.tolist() == theirs.tolist(), row
