"""Replayed steps of heads with a context layer: the same text and counts as op by op."""

from __future__ import annotations

import pytest
from context_stand_ins import accepting, heads_for
from stand_ins import RandomGate
from tape import TapeRecorder
from tiny_models import VOCAB, generated, prompt, tiny_model

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode

NEW = 40
TREES = {"static": StaticPolicy.from_widths([3, 2, 1]), "dynamic": DynamicPolicy(12, 4)}
GATES = {
    "open": AlwaysOpen,
    "random": RandomGate,
    "entropy": lambda: EntropyGate(3.04),
    "confidence": lambda: ConfidenceGate({1: 1.0, 8: 1.1, 64: 1.3}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_replayed_steps_are_the_same(
    name: str, tree: str, gate: str, rank: int | None, recorders: list[TapeRecorder]
) -> None:
    model, text = tiny_model(name), generated(name, "cpu", NEW)
    heads, counts = heads_for(model, conditional_rank=rank, draft_vocab=60), []
    for replay in (True, False, True):
        proposers = accepting(text) if tree == "dynamic" else None
        out = decode(
            model, heads, prompt(), max_new_tokens=NEW, tree=TREES[tree], gate=GATES[gate](), proposers=proposers,
            graphs=replay,
        )  # fmt: skip
        assert out.sequences.tolist() == text.tolist()
        assert out.stats.graphed_steps == (out.stats.steps if replay else 0)
        counts.append((out.stats.accepted_histogram, out.stats.open_steps))
    assert counts[0] == counts[1] == counts[2] and out.stats.captures == 0


def test_heads_with_and_without_take_turns(recorders: list[TapeRecorder]) -> None:
    """Recordings are of one kind of heads; a cache with room for a context layer serves both."""
    model = tiny_model("llama")
    with_layer = heads_for(model)
    config = CerberusConfig("tiny", 32, VOCAB, num_heads=3)
    without = CerberusHeads(config).requires_grad_(False).eval()
    found = [
        decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREES["static"], graphs=True).stats
        for heads in (without, with_layer) * 3
    ]
    assert [stats.captures > 0 for stats in found] == [True, True, True, False, False, False]
    assert found[0].accepted_histogram == found[2].accepted_histogram == found[4].accepted_histogram
    assert found[1].accepted_histogram == found[3].accepted_histogram == found[5].accepted_histogram
