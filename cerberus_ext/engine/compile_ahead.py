"""Compiles the steps of a decode before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.static_policy import StaticPolicy
from ..runtime.stats import DecodeStats
from ..runtime.stepper import HeadsLike, Sampling
from .forked import threads_after_fork

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compile_ahead(
    model: PreTrainedModel,
    heads: HeadsLike | None,
    *,
    tree: int | StaticPolicy | DynamicPolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
) -> DecodeStats:
    """Compiles what `decode(model, heads, ids, tree=..., gate=..., proposers=..., compile=True)` may need: a step of
    each number of nodes. Later decodes of the model then wait for nothing.

    Returns statistics of which `compilations`, `compile_seconds` and `row_invariant` are set. Raises CompileError
    where steps cannot be compiled.
    """
    from ..runtime.compiled_step import compiled_steps
    from ..runtime.graphs import open_stepper
    from .plan import make_plan

    threads_after_fork()
    plan, stats = make_plan(model, heads, tree, gate, proposers, compiled=True), DecodeStats()
    steps = compiled_steps(model, plan.sizes, stats)
    with (
        torch.inference_mode(),
        open_stepper(
            model, plan.heads, 1 + max(plan.sizes), 1, plan.drafts, plan.looks_ahead, Sampling(), stats, None, steps
        ) as stepper,
    ):
        stepper.prefill(torch.zeros((1, 1), dtype=torch.int64, device=model.device))
        for size in sorted(plan.sizes):
            stepper.base.prepare(size)
    return stats
