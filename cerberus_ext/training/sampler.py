"""Texts written by a model in batches, with transformers' `generate`.

What a text becomes depends on its prompt and its own random numbers alone (up to the rounding of products of another
size), so that it may be written in any company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor

from ..target.model import position_limit

LIKELY = 256  # tokens that are sorted first; where they have less than top_p of the mass, all are


@dataclass
class Text:
    """One text to write after `prompt`.

    temperature: 0 is greedy. top_p: the smallest set of tokens with at least this probability is drawn from.
    noise (limit,) float32 in [0, 1): one number for each token that may be written decides what is drawn.
    new: what was written, a stop token included.
    """

    prompt: Sequence[int]
    temperature: float
    top_p: float
    noise: Tensor
    new: list[int] = field(default_factory=list)


class Draws(LogitsProcessor):
    """Makes the token that a text's noise draws the most likely one, for a greedy `generate`."""

    def __init__(self, batch: list[Text], width: int, stop: Tensor, progress: Callable[[int], object]) -> None:
        self.width, self.stop, self.progress, device = width, stop, progress, stop.device
        self.limits = torch.tensor([len(text.noise) for text in batch], device=device)
        self.rows = torch.tensor([row for row, text in enumerate(batch) if text.temperature > 0], device=device)
        drawn = [text for text in batch if text.temperature > 0]
        self.temperature = torch.tensor([[text.temperature] for text in drawn], device=device)
        self.top_p = torch.tensor([text.top_p for text in drawn], device=device)
        self.noise = pad_sequence([text.noise for text in drawn], batch_first=True).to(device) if drawn else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        done = input_ids.shape[1] - self.width
        going = (self.limits > done) & ~torch.isin(input_ids[:, self.width :], self.stop).any(-1)
        self.progress(int(going.sum()))
        if self.noise is not None:
            noise = self.noise[:, min(done, self.noise.shape[1] - 1)]
            scores[self.rows, draw(scores[self.rows] / self.temperature, self.top_p, noise)] = torch.inf
        return scores


def write_texts(
    model: Any, texts: Sequence[Text], stop: frozenset[int], rows: int, progress: Callable[[int], object]
) -> None:
    """Fills in `new` of every text: until a token of `stop`, or as long as there is noise. At most `rows` at a time.

    model: a transformers causal LM; where a text would be longer than it can read, it ends. What its generation_config
    says of greedy texts, a repetition penalty say, applies.
    progress: called at every step with the number of tokens that are about to be written.
    """
    device = model.get_input_embeddings().weight.device
    order = sorted(texts, key=lambda text: len(text.prompt))  # like lengths: little padding
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        prompts = [torch.tensor(text.prompt, dtype=torch.int64) for text in batch]
        ids, mask = (
            pad_sequence(part, batch_first=True, padding_side="left").to(device)
            for part in (prompts, [torch.ones_like(prompt) for prompt in prompts])
        )
        width = ids.shape[1]
        limit = min(max(len(text.noise) for text in batch), position_limit(model) - width)
        draws = Draws(batch, width, torch.tensor(sorted(stop), dtype=torch.int64, device=device), progress)
        written = model.generate(
            ids, attention_mask=mask, max_new_tokens=limit, do_sample=False, num_beams=1, pad_token_id=0,
            eos_token_id=sorted(stop) or None, logits_processor=[draws],
        )[:, width:]  # fmt: skip
        for text, tokens in zip(batch, written.tolist(), strict=True):
            tokens = tokens[: len(text.noise)]
            text.new = tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))]


def draw(logits: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """Tokens (B,) of softmax(logits (B, V)), cut to the most likely ones with mass top_p (B,), by noise (B,)."""
    log_sum = logits.logsumexp(-1, keepdim=True)
    best = logits.topk(min(LIKELY, logits.shape[-1]))
    mass = (best.values - log_sum).exp().cumsum(-1)
    tokens = best.indices.gather(-1, nucleus_index(mass, top_p, noise))[:, 0]
    wide = (mass[:, -1] < top_p).nonzero()[:, 0]
    if len(wide) and logits.shape[-1] > LIKELY:
        ordered = logits[wide].sort(descending=True, stable=True)
        mass = (ordered.values - log_sum[wide]).exp().cumsum(-1)
        tokens[wide] = ordered.indices.gather(-1, nucleus_index(mass, top_p[wide], noise[wide]))[:, 0]
    return tokens


def nucleus_index(mass: Tensor, top_p: Tensor, noise: Tensor) -> Tensor:
    """mass (B, N): probability of the n most likely tokens; which of them noise (B,) picks, (B, 1)."""
    size = (mass < top_p[:, None]).sum(-1, keepdim=True).clamp(max=mass.shape[-1] - 1)  # index of the last one kept
    picked = torch.searchsorted(mass, noise[:, None] * mass.gather(-1, size), right=True)
    return torch.minimum(picked, size)
