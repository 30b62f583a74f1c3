"""A text token by token: who drafted each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Draft(NamedTuple):
    """From where a token came.

    step: counted from 1; 0: the prompt's forward. head: that drafted it, counted from 1; proposer: that drafted it, as
    in DecodeStats.trace_proposers; both 0: the target model chose it. node: of the step's tree, which has `nodes`.
    """

    step: int
    head: int = 0
    node: int = 0
    nodes: int = 1
    proposer: int = 0


def drafts_of(
    trace: Sequence[tuple[int, Sequence[int]]], proposers: Sequence[Sequence[int]], tokens: int
) -> list[Draft]:
    """trace, proposers: as in DecodeStats -> one entry for each of the text's `tokens`.

    A step that accepts a drafts gains them and one token of the target model. The text may end within the last step.
    """
    found = [Draft(0)]
    for step, ((nodes, path), who) in enumerate(zip(trace, proposers, strict=True), start=1):
        for depth, (node, proposer) in enumerate(zip(path, who, strict=True), start=1):
            found.append(Draft(step, 0 if proposer else depth, node, nodes, proposer))
        found.append(Draft(step, nodes=nodes))
    return found[:tokens]
