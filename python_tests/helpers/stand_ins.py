"""Heads and gates that know, draft or contradict what comes next: whatever they do, the text must stay the same."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch
from torch import Tensor

from cerberus_ext.drafting.drafter import Drafter
from cerberus_ext.drafting.gate import Gate, Signals


class StandInHeads(Drafter):
    """Heads without a network. To follow the text they are also given to `decode` as its streamer.

    text: the ids (1, S) that `decode` is expected to return, prompt included.
    """

    def __init__(self, text: Tensor, num_heads: int, vocab: int, seed: int = 0) -> None:
        self.config = SimpleNamespace(num_heads=num_heads)
        self.text = text[0].tolist()
        self.vocab = vocab
        self.seen = 0
        self.generator = torch.Generator().manual_seed(seed)

    def put(self, tokens: Tensor) -> None:
        self.seen += tokens.numel()

    def end(self) -> None:
        self.seen = 0

    def bind(self, model: torch.nn.Module) -> StandInHeads:
        return self

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        assert hidden.dim() == 2 and pending.tolist() == [self.text[self.seen - 1]]
        ids = self.make(drafts).to(pending.device)
        logprobs = torch.linspace(-0.1, -3, drafts, device=pending.device).expand(ids.shape)
        return ids[None], logprobs[None]

    def next_tokens(self) -> Tensor:
        """(K,): what really follows the pending token; past the end of the text, token 0."""
        follows = self.text[self.seen : self.seen + self.config.num_heads]
        return torch.tensor(follows + [0] * (self.config.num_heads - len(follows)))

    def make(self, drafts: int) -> Tensor:
        """-> (K, drafts)"""
        raise NotImplementedError


class RandomHeads(StandInHeads):
    def make(self, drafts: int) -> Tensor:
        return torch.randint(self.vocab, (self.config.num_heads, drafts), generator=self.generator)


class OracleHeads(StandInHeads):
    """The first draft is always right."""

    def make(self, drafts: int) -> Tensor:
        return (self.next_tokens()[:, None] + torch.arange(drafts)) % self.vocab


class LastDraftHeads(StandInHeads):
    """The last draft is always right, so that what is accepted is never where it stays in the cache."""

    def make(self, drafts: int) -> Tensor:
        return (self.next_tokens()[:, None] + 1 + torch.arange(drafts) + self.vocab - drafts) % self.vocab


class AdversarialHeads(StandInHeads):
    """No draft is ever right."""

    def make(self, drafts: int) -> Tensor:
        return (self.next_tokens()[:, None] + 1 + torch.arange(drafts)) % self.vocab


class RandomGate(Gate):
    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)

    def decide(self, signals: Signals) -> int:
        return signals.max_nodes if self.random.random() < 0.5 else 0
