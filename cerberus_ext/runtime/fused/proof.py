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


def check_fused(target: TargetModel, fused: FusedStep) -> None:
    """Raises NotFused where a step over a few tokens gets other logits from `fused` than from the model op by op.

    target: after its prompt. Slots behind the committed ones are written to, nothing is committed.
    """
    cache = target.cache
    fits = cache.capacity - cache.committed >= _TREE.size and target.max_depth() > 1
    tree = (_TREE if fits else ALONE).on(target.model.device)
    tokens = (torch.arange(len(tree.parents), device=target.model.device) * _STRIDE % target.vocabulary)[None]
    try:
        own = target.step(tokens, tree)[1][0].float()
    except IndexError as error:
        raise NotFused("the model has no position for another token") from error
    got = fused.step([target.row(tokens, tree)])[1].float()
    apart = difference(got, own)
    if not apart <= _LARGEST_DIFFERENCE[target.model.dtype]:
        raise NotFused(f"its program computes other logits than the model ({apart:.1%} apart)")
