"""Decoding with drafts: docs/design.md, "One decoding step", in code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..drafting.gate import Gate, Signals
from ..drafting.proposers import HeadsSignals
from ..drafting.tree import ALONE, Tree, TreePolicy, Trees
from ..io.checks import call, check_integer
from ..runtime.stepper import Chunk, Stepper
from .plan import Plan
from .text import GeneratedText


class StepSignals(HeadsSignals, Protocol):
    """What a gate or a tree may want to see of a step; a Stepper has it."""

    @property
    def hidden(self) -> Tensor: ...

    def entropy(self) -> float: ...


def propose(step: StepSignals, policy: TreePolicy, gate: Gate, trees: Trees, max_depth: int) -> Tree:
    """The tree that the gate wants to be verified at this step, no deeper than max_depth. It is shown what it needs.

    max_depth: 0 where a draft is of no use; the gate is then not asked.
    """
    if max_depth < 1 or policy.size < 2:
        return ALONE
    weighed = "expected_tokens" in gate.needs
    tree = trees.grow(step, max_depth, True) if weighed else None
    signals = Signals(
        policy.size,
        step.hidden if "hidden" in gate.needs else None,
        step.entropy() if "entropy" in gate.needs else None,
        None if tree is None else tree.expected_tokens,
    )
    decide = f"{type(gate).__name__}.decide"
    nodes = check_integer(f"decode: gate: what {decide} returns", call(f"decode: gate: {decide}", gate.decide, signals))
    if nodes < 2:
        return ALONE
    return (tree or trees.grow(step, max_depth, False)).first(nodes)


def generate(stepper: Stepper, plan: Plan, text: GeneratedText) -> Iterator[Chunk]:
    """Generates the text, step by step -> the tokens that it takes of each, first that of the prompt's forward."""
    stats = stepper.stats
    with torch.inference_mode():
        with stats.phase("prefill"):
            first = stepper.prefill(text.prompt)
        with stats.phase("draft"):
            trees = plan.begin(text.prompt[0].tolist() + first)
        with stats.phase("prefill"):
            text.begin()
            chunk = Chunk(text.add(first), [None])
    yield chunk
    while not text.ended:
        with torch.inference_mode():  # not where the caller goes on: it would be his mode, too
            with stats.phase("draft"):  # a step adds one token more than it accepts drafts
                max_depth = min(text.remaining - 1, stepper.max_depth())
                tree = propose(stepper, plan.policy, plan.gate, trees, max_depth)
            chunk = stepper.step(tree)  # forward, verify, commit
            with stats.phase("commit"):
                taken = text.add(chunk.tokens)
                trees.extend(taken)
        yield chunk.first(len(taken))
