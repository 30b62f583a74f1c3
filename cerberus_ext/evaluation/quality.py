"""What a change of a model's weights costs: how it takes the answers that the model gave before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..engine.decode import decode


@dataclass(frozen=True)
class Answer:
    """ids (1, S): prompt and greedy answer. prompt: tokens of the first."""

    ids: Tensor
    prompt: int


@dataclass(frozen=True)
class Quality:
    """perplexity: of the answers' tokens. agreement: the share of them that the model itself says at their place."""

    perplexity: float
    agreement: float


def own_answers(model: PreTrainedModel, prompts: Sequence[Tensor], new_tokens: int) -> list[Answer]:
    """What the model answers, greedily. prompts: (1, S) each. Raises as `decode`."""
    return [Answer(decode(model, None, ids, max_new_tokens=new_tokens).sequences, ids.shape[1]) for ids in prompts]


def quality(model: PreTrainedModel, answers: Sequence[Answer]) -> Quality:
    """Of the model as it is now, by its own forward, which rounds otherwise than `decode`: near ties may differ."""
    losses, right = [], []
    for answer in answers:
        with torch.inference_mode():
            logits = model(answer.ids, use_cache=False).logits[0, answer.prompt - 1 : -1].float()
        wanted = answer.ids[0, answer.prompt :]
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return Quality(math.exp(torch.cat(losses).mean()), torch.cat(right).float().mean().item())
