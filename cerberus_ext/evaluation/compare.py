"""Decoding with and without drafts, in turns in one process."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..drafting.gate import AlwaysClosed
from ..drafting.heads import CerberusHeads
from ..engine.decode import decode


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

    ids: (1, S) int64. rounds: how often each is run; the medians count.
    """
    plain_options = {**options, "tree": None, "gate": AlwaysClosed()}
    pairs = [[decode(model, heads, ids, **each) for each in (plain_options, options)] for _ in range(rounds)]
    plain, ours = (median(out.stats.tokens_per_second for out in outs) for outs in zip(*pairs, strict=True))
    return Comparison(ours, plain, all(torch.equal(one.sequences, other.sequences) for one, other in pairs))
