"""Heads without a network whose drafts are computed on the device, so that a step can be recorded with them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext.drafting.drafter import Drafter


class StaticHeads(Drafter):
    """Finds where in `text` the model is, by its hidden state, and drafts what follows there.

    text: (1, S), what `decode` is expected to return. ranks (K,): which draft of each head is right; one that heads do
    not make: none is. every: at all places but each `every`-th one, where no draft is right.
    """

    recordable = True

    def __init__(self, model: PreTrainedModel, text: Tensor, ranks: list[int], every: int = 0) -> None:
        self.config = SimpleNamespace(num_heads=len(ranks))
        self.vocab = model.config.vocab_size
        with torch.inference_mode():
            # Nothing follows the last token, which may be beyond the positions of the model.
            self.hidden = model(text[:, :-1], output_hidden_states=True).hidden_states[-1][0]  # (S - 1, D)
        places, heads = torch.arange(text.shape[1] - 1), torch.arange(len(ranks))
        follows = torch.cat([text[0].cpu(), torch.zeros(len(ranks) + 2, dtype=text.dtype)])
        shift = -torch.tensor(ranks)
        if every:
            shift = torch.where((places % every == 0)[:, None], 1, shift)
        self.first = (follows[places[:, None] + heads + 2] + shift).to(text.device)  # (S - 1, K): the best draft
        self.drafts = 0

    def bind(self, model: PreTrainedModel) -> StaticHeads:
        return self

    def renew(self, new: Drafter) -> bool:
        return True

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        self.drafts += 1
        place = (self.hidden[None] - hidden[:, None]).abs().sum(-1).argmin(-1)  # (B,)
        ranks = torch.arange(drafts, device=pending.device)
        ids = (self.first.index_select(0, place)[:, :, None] + ranks) % self.vocab
        # Depends on the text, so that a gate that reads it notices where it is.
        logprobs = -(1 + ranks) * (0.1 + (pending[:, None, None] % 7) * 0.2)
        return ids, logprobs.float().expand(ids.shape)
