"""Decoding with and without drafts, timed in turns in one process, because machines are noisy."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..drafting.heads import CerberusHeads


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds; speeds in new tokens a second, prompt processing included."""

    tokens_per_second: float
    plain_tokens_per_second: float
    same_output: bool

    @property
    def speed_up(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


def compare_with_plain(
    model: PreTrainedModel, heads: CerberusHeads | None, ids: Tensor, *, rounds: int = 3, **options: Any
) -> Comparison:
    """Times `decode(model, heads, ids, **options)` against the same loop with the gate never open.

    ids: (1, S) int64. rounds: how often each is run, in turns; the medians count.
    """
    from ..drafting.gate import AlwaysClosed
    from ..engine.decode import decode

    plain_options = {**options, "tree": None, "gate": AlwaysClosed()}
    ours, plain, same = [], [], True
    for _ in range(rounds):
        first = decode(model, heads, ids, **plain_options)
        second = decode(model, heads, ids, **options)
        plain.append(first.stats.tokens_per_second)
        ours.append(second.stats.tokens_per_second)
        same = same and torch.equal(first.sequences, second.sequences)
    return Comparison(median(ours), median(plain), same)
