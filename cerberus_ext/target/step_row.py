"""What a step computes of each text, and who may do that in the model's place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .cache import TreeCache


class StepRow(NamedTuple):
    """What a step computes of one text, whose cache has one row: tokens, positions (N,) int64, ancestors (N, W)."""

    cache: TreeCache
    tokens: Tensor
    positions: Tensor
    ancestors: Tensor


class StepForward(Protocol):
    """Does the steps of a TargetModel in the model's place."""

    def step(self, rows: Sequence[StepRow], logits_of: int | None = None) -> tuple[Tensor, Tensor]:
        """rows: of texts of the model -> hidden (N, D), logits (R, V) of all their nodes, a row behind the
        other; logits of the last `logits_of` nodes, None: of all."""


@lru_cache(maxsize=128)
def chain_ancestors(nodes: int) -> Tensor:
    """(N, W) int64, as of a Topology, where every node hangs below the one before."""
    seen = torch.arange(1, nodes + 1)[:, None] - 64 * torch.arange(-(-nodes // 64))  # of each word's 64 nodes
    return torch.where(seen >= 64, -1, (1 << seen.clamp(0, 63)) - 1)
