"""Replayed steps with heads whose numbers have overflown: their drafts are none, and the text is the same."""

from __future__ import annotations

import copy
import math

import pytest
from static_stand_ins import StaticHeads
from tape import TapeRecorder
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor

from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode

NEW = 12


class OverflownHeads(StaticHeads):
    """Right, but that the drafts of head 2 on are no tokens, or have no probability."""

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        ids, logprobs = (part.clone() for part in super().draft(hidden, pending, drafts))
        ids[:, 1].fill_(VOCAB + 5)
        logprobs[:, 2].fill_(math.nan)
        return ids, logprobs


@pytest.mark.parametrize("gate", [AlwaysOpen(), ConfidenceGate({1: 1.0, 8: 1.01})])
@pytest.mark.parametrize("tree", [StaticPolicy.from_widths([2, 2, 1]), DynamicPolicy(8)])
def test_replayed(tree: object, gate: object, recorders: list[TapeRecorder]) -> None:
    if isinstance(tree, StaticPolicy):
        gate = ConfidenceGate({1: 1.0, tree.size: 1.01}) if isinstance(gate, ConfidenceGate) else gate
    model = copy.deepcopy(tiny_model("llama"))
    want = generated("llama", "cpu", NEW)
    heads = OverflownHeads(model, want, [0, 0, 0])
    proposers = None if isinstance(tree, StaticPolicy) else []
    for _ in range(2):
        out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=tree, gate=gate, proposers=proposers, graphs=True)
        assert out.sequences.equal(want) and out.stats.graphed_steps == out.stats.steps
        assert out.stats.accepted_histogram == [1, 5], "head 1's draft at each step but the last one"
