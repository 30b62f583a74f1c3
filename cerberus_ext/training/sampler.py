"""Texts written by a model in batches, with a key/value cache of their own.

What a text becomes depends on its prompt and its own random numbers alone (up to the rounding of products of another
size), so that it may be written in any company. A finished text leaves the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ..io.transformers_names import cache_argument

ROOM = 128  # tokens by which the cache grows
LIKELY = 256  # tokens that are sorted first; where they have less than top_p of the mass, all are
FINISHED = 0.25  # share of the batch from which on it is worth a copy of the cache to leave the finished texts out


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

    def finished(self, stop: frozenset[int]) -> bool:
        return len(self.new) == len(self.noise) or bool(self.new) and self.new[-1] in stop


class RoomyLayer(DynamicLayer):
    """A layer of a cache with room for more tokens than it has, so that most steps copy nothing."""

    key_room: Tensor | None = None
    value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        length = self.get_seq_length()
        self.key_room, self.keys = appended(self.key_room, self.keys, length, key_states)
        self.value_room, self.values = appended(self.value_room, self.values, length, value_states)
        return self.keys, self.values


def appended(room: Tensor | None, held: Tensor, length: int, new: Tensor) -> tuple[Tensor, Tensor]:
    """Puts new (B, H, N, E) behind held (B, H, length, E), a view of `room` unless rows were selected.

    Returns the room, which may be another one, and the view of it that holds both.
    """
    end = length + new.shape[-2]
    if room is None or held.data_ptr() != room.data_ptr() or end > room.shape[-2]:
        room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
        if length:
            room[..., :length, :] = held
    room[..., length:end, :] = new
    return room, room[..., :end, :]


@torch.inference_mode()
def write_texts(
    model: Any, texts: Sequence[Text], stop: frozenset[int], rows: int, progress: Callable[[int], object]
) -> None:
    """Fills in `new` of every text: until a token of `stop`, or as long as there is noise. At most `rows` at a time.

    model: a transformers causal LM. progress: called with the number of tokens of every step.
    """
    order = sorted(texts, key=lambda text: len(text.prompt))  # like lengths: little padding
    for start in range(0, len(order), rows):
        write_batch(model, order[start : start + rows], stop, progress)


def write_batch(model: Any, batch: list[Text], stop: frozenset[int], progress: Callable[[int], object]) -> None:
    device = model.get_input_embeddings().weight.device
    width = max(len(text.prompt) for text in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(batch):  # padded on the left: every text's next token is in the last column
        ids[row, width - len(text.prompt) :] = torch.tensor(text.prompt)
        mask[row, width - len(text.prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    while True:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1,
            **{cache_argument(model): cache},
        ).logits[:, -1]  # fmt: skip
        written = 0
        for text, token in zip(batch, choose(logits.float(), batch), strict=True):
            if not text.finished(stop):
                text.new.append(token)
                written += 1
        progress(written)
        going = [row for row, text in enumerate(batch) if not text.finished(stop)]
        if not going:
            return
        positions = positions[:, -1:]
        if len(going) <= len(batch) * (1 - FINISHED):
            batch = [batch[row] for row in going]
            kept = torch.tensor(going, device=device)
            cache.batch_select_indices(kept)
            mask, positions = mask[kept], positions[kept]
        ids = torch.tensor([[text.new[-1]] for text in batch], device=device)
        mask = torch.cat([mask, mask.new_ones(len(batch), 1)], dim=-1)
        positions = positions + 1


def choose(logits: Tensor, batch: list[Text]) -> list[int]:
    """The next token of every text, from logits (B, V) float32; of a finished text, any."""
    tokens = logits.argmax(-1)
    rows = [row for row, text in enumerate(batch) if text.temperature > 0]
    if not rows:
        return tokens.tolist()
    device = logits.device
    temperature = torch.tensor([batch[row].temperature for row in rows], device=device)
    top_p = torch.tensor([batch[row].top_p for row in rows], device=device)
    noise = torch.stack([batch[row].noise[min(len(batch[row].new), len(batch[row].noise) - 1)] for row in rows])
    index = torch.tensor(rows, device=device)
    tokens[index] = draw(logits[index] / temperature[:, None], top_p, noise.to(device))
    return tokens.tolist()


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
