"""A fused step beside the model itself: finds what a trace may have got wrong, before any text is generated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...drafting.static_policy import StaticPolicy
from ...drafting.tree import ALONE
from ..capability import difference
from .trace import NotFused

if TYPE_CHECKING:
    from ...target.model import TargetModel
    from .step import FusedStep

_TREE = StaticPolicy.from_paths([(0,), (1,), (0, 0)]).tree
_STRIDE = 7919  # between token ids; any, as long as they differ
# Largest difference of the logits, as a share of their norm: rounding stays far below.
_LARGEST_DIFFERENCE = {torch.float32: 0.001, torch.float16: 0.1, torch.bfloat16: 0.1}


class StepProof:
    """Made before there is a fused step: the model's weights need not be in memory beside those of that one."""

    def __init__(self, target: TargetModel) -> None:
        """target: after its prompt. Slots behind the committed ones are written to, nothing is committed.

        Raises NotFused where the model has no position for a step.
        """
        cache = target.cache
        fits = cache.capacity - cache.committed >= _TREE.size and target.max_depth() > 1
        self._target, self._tree = target, (_TREE if fits else ALONE).on(target.model.device)
        numbers = torch.arange(len(self._tree.parents), device=target.model.device)
        self._tokens = (numbers * _STRIDE % target.vocabulary)[None]
        try:
            self._logits = target.step(self._tokens, self._tree)[1][0].float()
        except IndexError as error:
            raise NotFused("the model has no position for another token") from error

    def check(self, fused: FusedStep) -> None:
        """Raises NotFused where a step over a few tokens gets other logits from `fused` than op by op."""
        got = fused.step([self._target.row(self._tokens, self._tree)])[1].float()
        apart = difference(got, self._logits)
        if not apart <= _LARGEST_DIFFERENCE[self._target.model.dtype]:
            raise NotFused(f"its program computes other logits than the model ({apart:.1%} apart)")
