"""One step of several texts on a CPU, with one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.step import settle
from ..target.model import TargetModel
from ..target.step_row import StepForward
from .sampling import Chooser, Sampling
from .static_result import Read
from .static_step import StaticNodes, StepKind, StepMemory, begin_step


class TextStep(NamedTuple):
    """The step of one text, as in `static_step.run_step`."""

    target: TargetModel
    kind: StepKind
    memory: StepMemory


def run_together(fused: StepForward, texts: Sequence[TextStep]) -> list[Read]:
    """As `run_step` of each of them -> what came out of each, but for the entropy."""
    sizes, trees = [text.kind.nodes for text in texts], [text.memory.nodes(text.kind.nodes) for text in texts]
    states, caches = [text.memory.state for text in texts], [text.memory.cache for text in texts]
    inputs = [begin_step(*text) for text in texts]
    rows = [text.target.row(given.known, tree) for text, given, tree in zip(texts, inputs, trees, strict=True)]
    hidden, logits = fused.step(rows)  # (N, D), (N, V) of all nodes
    tokens, positions = torch.cat([given.tokens[0] for given in inputs]), torch.cat([row.positions for row in rows])
    # The token after a node stands one place behind it.
    target = _targets([text.kind.chooser for text in texts], logits, tokens, positions + 1, trees)  # (N,)
    told = [
        (text.kind.drafter, nodes, given.known, tree, state, cache)
        for text, nodes, given, tree, state, cache in zip(
            texts, hidden[None].split(sizes, 1), inputs, trees, states, caches, strict=True
        )
    ]
    for drafter, nodes, known, tree, state, cache in told:
        drafter.keep_nodes(cache, state.hidden, nodes, known, tree)
    path = torch.empty_like(target)
    settle(
        tokens, target, torch.cat([tree.parents for tree in trees]), [tree.ancestors for tree in trees],
        [cache.tensor for cache in caches if cache.tensor is not None], [cache.length for cache in caches], hidden,
        [state.hidden for state in states], [state.pending for state in states], path,
    )  # fmt: skip
    paths = path.split(sizes)
    for (drafter, nodes, known, *_), kept in zip(told, paths, strict=True):
        drafter.keep_path(nodes, known, kept[None])
    return [
        Read(chosen.tolist(), [node for node in kept.tolist() if node >= 0], None, None)
        for chosen, kept in zip(target.split(sizes), paths, strict=True)
    ]


def _targets(
    choosers: Sequence[Chooser], logits: Tensor, tokens: Tensor, positions: Tensor, trees: Sequence[StaticNodes]
) -> Tensor:
    """`Chooser.targets` of all texts' nodes, (N,): at once, where they choose alike and look at nothing else."""
    first = choosers[0]
    if type(first) is Sampling and all(chooser == first for chooser in choosers):  # Typical looks at the tree
        return first.choose(logits, positions)
    sizes = [len(tree.parents) for tree in trees]
    parts = zip(choosers, *(part[None].split(sizes, 1) for part in (logits, tokens, positions)), trees, strict=True)
    return torch.cat([chooser.targets(one, at, tree.tree, to)[0] for chooser, one, at, to, tree in parts])
