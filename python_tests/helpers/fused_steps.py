"""A step of a tiny model as a fused program and op by op, over the same tree after the same prompt."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import prompt
from torch import Tensor

from cerberus_ext.drafting.tree import Tree
from cerberus_ext.runtime.fused.step import FusedStep
from cerberus_ext.target.attention import names_attention
from cerberus_ext.target.model import StepWay, TargetModel

CAPACITY = 256


def every_call_seen(model: Any, capacity: int = CAPACITY) -> TargetModel:
    """Whose steps op by op are all of our row-invariant ops, where there is one."""
    return TargetModel(model, StepWay(names_attention(model), sees_all=True), capacity)


def both_ways(model: Any, tree: Tree, pack: bool | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, logits and the cache of a step over `tree`: fused, and op by op."""
    found: list[list[Tensor]] = []
    with torch.inference_mode():
        for fuses in (True, False):
            with every_call_seen(model) as target:
                target.prefill(prompt())
                topology = tree.on(torch.device("cpu"))
                tokens = (torch.arange(tree.size) * 7 % target.vocabulary)[None]
                if fuses:
                    target.fused = FusedStep(target, pack)
                hidden, logits = target.step(tokens, topology)
                assert target.cache.tensor is not None
                found.append([hidden.clone(), logits.clone(), target.cache.tensor.clone()])
    return found[0], found[1]
