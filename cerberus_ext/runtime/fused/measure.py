"""How long the stages of a fused step take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ...drafting.tree import Tree
from .explain import explain
from .step import FusedStep

if TYPE_CHECKING:
    from ...target.model import TargetModel

_RUNS = 5


def explained(target: TargetModel, tree: Tree) -> str:
    """The program of `target`, whose steps are fused, with the times of steps over `tree`; nothing is committed."""
    fused = target.fused
    assert isinstance(fused, FusedStep)
    with torch.inference_mode():
        topology = tree.on(target.model.device)
        tokens = torch.zeros((1, tree.size), dtype=torch.int64, device=target.model.device)
        target.step(tokens, topology)
        fused.times(True)
        for _ in range(_RUNS):
            target.step(tokens, topology)
        seconds = [time / _RUNS for time in fused.times(False)]
    return explain(fused.program, seconds, fused.packed)
