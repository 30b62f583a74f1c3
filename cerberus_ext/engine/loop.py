"""Decoding with drafts: docs/design.md, "One decoding step", in code."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..drafting.gate import Gate, Signals
from ..drafting.proposers import HeadsSignals
from ..drafting.tree import ALONE, Tree, TreePolicy, Trees
from ..io.checks import call, check_integer
from ..runtime.session import Session
from ..runtime.stats import shared_phase
from ..runtime.stepper import Chunk, Stepper, step_together
from .budget import ALL, Budget, Terms
from .plan import Plan
from .request import Request


class StepSignals(HeadsSignals, Protocol):
    """What a gate or a tree may want to see of a step; a Stepper has it."""

    @property
    def hidden(self) -> Tensor: ...

    def entropy(self) -> float: ...


def propose(
    step: StepSignals, policy: TreePolicy, gate: Gate, trees: Trees, max_depth: int, terms: Terms = ALL
) -> Tree:
    """The tree that the gate wants to be verified at this step, no deeper than max_depth. It is shown what it needs.

    max_depth: 0 where a draft is of no use. Where there is none that is of use, the gate is not asked.
    """
    if max_depth < 1 or policy.size < 2:
        return ALONE
    weighed = "expected_tokens" in gate.needs
    heads = step if terms.asks_heads or not policy.looks else None  # trees of ranks are made of nothing else
    tree = trees.grow(heads, max_depth, True, terms.least) if weighed else None
    if tree is ALONE:
        return ALONE
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
    return (tree or trees.grow(heads, max_depth, False, terms.least)).first(nodes)


@dataclass
class Row:
    """A text that is being generated, in a slot of its own."""

    request: Request
    stepper: Stepper
    trees: Trees

    def propose(self, plan: Plan, terms: Terms) -> Tree:
        """A step adds one token more than it accepts drafts."""
        max_depth = min(self.request.text.remaining - 1, self.stepper.max_depth())
        return propose(self.stepper, plan.policy, plan.gate, self.trees, max_depth, terms)

    def add(self, chunk: Chunk) -> Chunk:
        """The tokens of a step -> what the text takes of them."""
        with self.stepper.stats.phase("commit"):
            taken = self.request.text.add(chunk.tokens)
            self.trees.extend(taken)
        return chunk.first(len(taken), self.request.row)


def begin(session: Session, plan: Plan, request: Request, keep: bool) -> tuple[Row, Chunk]:
    """Reads a prompt -> the text's row, and the token of the prompt's forward."""
    text, stats = request.text, request.stats
    with torch.inference_mode():
        stepper = session.open(request.chooser, stats, request.capacity, text.prompt if keep else None)
        try:
            with stats.phase("prefill"):
                first = stepper.prefill(text.prompt)
            with stats.phase("draft"):
                trees = plan.begin(text.prompt[0].tolist() + first)
            with stats.phase("prefill"):
                text.begin()
                return Row(request, stepper, trees), Chunk(text.add(first), [None], request.row)
        except BaseException:
            session.close(stepper)
            raise


def generate(
    session: Session, plan: Plan, waiting: deque[Request], slots: int, keep: bool, apart: bool = False
) -> Iterator[Chunk]:
    """Generates the texts, step by step -> the tokens that they take of each, first that of the prompt's forward.

    A text that ends frees its slot, which the next one takes before the next step. One alone is a batch of one.
    waiting: is taken from; more may be put there between the chunks. apart: see `Batch.chunks`.
    """
    rows: list[Row] = []
    budget = Budget(plan.costs)
    while waiting or rows:
        if waiting and len(rows) < slots:
            request = waiting.popleft()
            try:
                row, chunk = begin(session, plan, request, keep)
                rows.append(row)
            except Exception as error:
                if not apart:
                    raise
                request.error, request.text.stopped = error, True
                chunk = Chunk([], [], request.row)
            chunks = [chunk]
        else:
            with torch.inference_mode():  # not where the caller goes on: it would be his mode, too
                with shared_phase([row.stepper.stats for row in rows], "draft"):
                    terms = budget.terms(len(rows))
                    trees = budget.share([row.propose(plan, terms) for row in rows])
                found = step_together([row.stepper for row in rows], trees)  # forward, verify, commit
                chunks = [row.add(chunk) for row, chunk in zip(rows, found, strict=True)]
        for row in [row for row in rows if row.request.text.ended]:
            rows.remove(row)
            session.close(row.stepper)
        yield from chunks
