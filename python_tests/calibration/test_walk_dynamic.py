"""The walk through a traced text with trees new takes the steps of `decode`, one by one."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from memorized import answer, hand_made, memorize
from tiny_models import VOCAB, prompt, tiny_model

from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import Answer, TracedText, trace
from cerberus_ext.calibration.walk import Tally, accepted_by, accepted_lengths, walk
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from cerberus_ext.drafting.heads import CerberusHeads
from cerberus_ext.drafting.proposers import ProposerFactory
from cerberus_ext.drafting.simulate import steps_through
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.suffix import DocumentProposer, SuffixProposer
from cerberus_ext.drafting.tree import Tree
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.stats import DecodeStats

NEW = 60
FLAT = StepCosts((1, 65), (10,), (1.0,), ((1.0,), (1.0,)))
CORRECTIONS = ((0.5, -1.0), (0.4, 0.4), (1.0, 0.0))
TREES = {
    "4": DynamicPolicy(4),
    "11": DynamicPolicy(11, drafts=3),
    "32": DynamicPolicy(32, drafts=16),
    "corrected": DynamicPolicy(8, platt=CORRECTIONS),
}


@cache
def traced(name: str, dtype: torch.dtype = torch.float32) -> tuple[CerberusHeads, Answer, TracedText]:
    """A text that says itself again after a while, and heads that know a part of it."""
    model = tiny_model(name, "cpu", dtype)
    first = answer(model, prompt(), 30)
    found = answer(model, torch.cat([first.ids, first.ids[:, :9]], 1), NEW)
    heads = memorize(model, [Answer(0, found.ids[:, : found.prompt + NEW // 2], found.prompt, NEW // 2)], steps=40)
    return heads, found, trace(model, heads, found)


def proposers_of(kind: str, text: Answer) -> list[ProposerFactory] | None:
    return {
        "usual": None,
        "none": [],
        "suffix": [SuffixProposer(max_match=3)],
        "documents": [SuffixProposer(), DocumentProposer([text.ids[0, 5:].tolist()])],
    }[kind]


def gates(text: TracedText) -> dict[str, Gate]:
    return {
        "open": AlwaysOpen(),
        "closed": AlwaysClosed(),
        "entropy": EntropyGate(median(text.entropy)),
        "confidence": ConfidenceGate({1: 1.0, 2: 1.2, 8: 1.9, 64: 4.0}, margin=0.2),
    }


def same(tally: Tally, stats: DecodeStats) -> None:
    histogram = [tally.accepted[count] for count in range(len(stats.accepted_histogram))]
    assert histogram == stats.accepted_histogram and sum(histogram) == tally.steps
    assert (tally.steps, tally.open_steps, tally.zero_accept_steps) == (
        stats.steps,
        stats.open_steps,
        stats.zero_accept_steps,
    )
    assert tally.tokens_per_step == stats.tokens_per_step and tally.tokens == stats.new_tokens - 1
    assert tally.nodes_per_step == stats.nodes_per_step and tally.nodes == sum(nodes for nodes, _ in stats.trace)


@pytest.mark.parametrize("kind", ["usual", "none", "suffix", "documents"])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_same_steps_as_decode(name: str, tree: str, kind: str) -> None:
    heads, found, text = traced(name)
    proposers = proposers_of(kind, found)
    out = decode(
        tiny_model(name), heads, found.ids[:, : found.prompt], max_new_tokens=NEW, tree=TREES[tree], proposers=proposers
    )
    assert out.sequences.equal(found.ids)
    same(walk([text], TREES[tree], AlwaysOpen(), FLAT, proposers), out.stats)
    assert out.stats.tokens_per_step > 1.2, "else little is tested"


@pytest.mark.parametrize("kind", ["usual", "none"])
@pytest.mark.parametrize("tree", TREES)
def test_same_steps_with_conditional_drafts(tree: str, kind: str) -> None:
    plain, found, text = traced("llama")
    heads = CerberusHeads(replace(plain.config, conditional_rank=4)).requires_grad_(False).eval()
    heads.load_state_dict(plain.state_dict(), strict=False)
    assert heads.conditional is not None
    heads.conditional.keys.copy_(0.3 * torch.randn(heads.conditional.keys.shape, generator=torch.manual_seed(1)))
    weighed, proposers = trace(tiny_model("llama"), heads, found), proposers_of(kind, found)
    out = decode(
        tiny_model("llama"), heads, found.ids[:, : found.prompt], max_new_tokens=NEW, tree=TREES[tree],
        proposers=proposers,
    )  # fmt: skip
    assert out.sequences.equal(found.ids)
    tally = walk([weighed], TREES[tree], AlwaysOpen(), FLAT, proposers)
    same(tally, out.stats)
    assert weighed.ids.equal(text.ids), "what is drafted stays, and is only weighed"
    assert tally.expected != walk([text], TREES[tree], AlwaysOpen(), FLAT, proposers).expected


@pytest.mark.parametrize("kind", gates(hand_made([[0]])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_steps_with_gates(dtype: torch.dtype, kind: str) -> None:
    heads, found, text = traced("llama", dtype)
    gate, tree = gates(text)[kind], DynamicPolicy(20)
    out = decode(
        tiny_model("llama", "cpu", dtype), heads, found.ids[:, : found.prompt], max_new_tokens=NEW, tree=tree, gate=gate
    )
    tally = walk([text], tree, gate, FLAT)
    same(tally, out.stats)
    assert kind in ("open", "closed") or 0.1 < tally.gate_open_rate < 0.98


def test_same_steps_without_drafts() -> None:
    _, _, text = traced("llama")
    tally = walk([text], StaticPolicy.root(), AlwaysOpen(), FLAT)
    assert (tally.steps, tally.open_steps, tally.nodes) == (NEW - 1, 0, NEW - 1)


def test_accepted_at_every_place() -> None:
    """By trees of the heads alone: where a step begins, what the walk accepts there."""
    _, _, text = traced("llama")
    policy = DynamicPolicy(8)
    lengths, tally = accepted_lengths(text, policy), walk([text], policy, AlwaysOpen(), FLAT, [])
    assert len(lengths) == len(text) and dict(tally.accepted) == dict(
        Counter(steps_through(len(text), lengths.__getitem__))
    )
    assert set(lengths) == {0, 1, 2, 3}


@pytest.mark.parametrize("new", [2, 3, 4, 17])
def test_same_steps_in_short_texts(new: int) -> None:
    heads, found, _ = traced("llama")
    short = Answer(0, found.ids[:, : found.prompt + new], found.prompt, new)
    model = tiny_model("llama")
    stats = decode(model, heads, found.ids[:, : found.prompt], max_new_tokens=new, tree=DynamicPolicy(32)).stats
    same(walk([trace(model, heads, short)], DynamicPolicy(32), AlwaysOpen(), FLAT), stats)


def test_a_text_that_ends_by_itself() -> None:
    """Also in the middle of what a step accepts: the walk does not see what would have come behind."""
    heads, found, _ = traced("llama")
    model, ids = tiny_model("llama"), found.ids[:, : found.prompt]
    tokens = found.ids[0, found.prompt :].tolist()
    places = [place for place in range(1, 40) if tokens[place] not in tokens[:place]]
    for place in places:
        out = decode(model, heads, ids, max_new_tokens=NEW, tree=DynamicPolicy(16), eos_token_id=tokens[place])
        tally = walk(
            [trace(model, heads, Answer(0, out.sequences, found.prompt, NEW))], DynamicPolicy(16), AlwaysOpen(), FLAT
        )
        assert (tally.steps, tally.tokens, tally.nodes_per_step) == (out.stats.steps, place, out.stats.nodes_per_step)
    assert len(places) > 4


def step_tree(parents: list[int], tokens: list[int]) -> Tree:
    zeros = np.zeros(len(parents), np.int64)
    return Tree(np.array(parents), np.array(tokens), zeros, np.ones(len(parents)))


@pytest.mark.parametrize(
    ("ahead", "accepted"),
    [([5, 7, 9, 1], 3), ([5, 7, 8], 2), ([6, 7, 5], 2), ([6, 8], 1), ([7, 9], 0), ([5], 1), ([], 0), ([0], 0)],
)
def test_accepted_by_a_tree_drawn_by_hand(ahead: list[int], accepted: int) -> None:
    """0 -> 5 -> 7 -> 9, 0 -> 6 -> 7; the root's own token, 0 here, is no draft."""
    assert accepted_by(step_tree([0, 0, 0, 1, 2, 3], [0, 5, 6, 7, 7, 9]), ahead) == accepted


def test_seconds_of_steps_that_have_looked() -> None:
    """Both best drafts are always right: steps at places 0, 3 and 6, where a tree is one draft deep, but wider."""
    text = hand_made([[0, 0]] * 8, logprobs=torch.tensor([0.9, 0.02, 0.02, 0.02]).log().expand(8, 2, 4))
    text = replace(text, deepest=[7 - place for place in range(8)])
    costs = StepCosts((1, 3), (10, 20), (1.0, 2.0), ((3.0, 4.0), (30.0, 40.0)), entropy=100.0)
    tally = walk([text], DynamicPolicy(3), AlwaysOpen(), costs, [])
    # After 10, 13 and 16 tokens.
    assert tally.seconds == pytest.approx(30 + 33 + 36) and (tally.nodes, dict(tally.accepted)) == (9, {2: 2, 1: 1})
    # The gate opens nowhere: nobody has looked, except for the entropy.
    closed = walk([text], DynamicPolicy(3), EntropyGate(-1.0), costs, [])
    assert closed.seconds == pytest.approx(sum(1 + place / 10 for place in range(8)) + 700) and closed.nodes == 8
    looked = walk([text], DynamicPolicy(3), ConfidenceGate({1: 1.0, 3: 100.0}), costs, [])
    assert looked.seconds == pytest.approx(sum(3 + place / 10 for place in range(7)) + 1.7) and looked.open_steps == 0


class Recorded:
    """A proposer that writes down what it is told."""

    def __init__(self, heard: list[Any], prompt: list[int]) -> None:
        self.heard = heard
        heard.append(prompt)

    def extend(self, tokens: list[int]) -> None:
        self.heard.append(tokens)

    def propose(self, most: int) -> tuple[list[int], list[float]]:
        return [], []


def test_sources_see_the_text_as_far_as_it_is_known() -> None:
    text = hand_made([[0, 0], [0, 0], [0, 0], [0, 0], [2, 0]], prompt=2)
    text = replace(text, deepest=[4 - place for place in range(5)])
    heard: list[Any] = []
    walk([text], DynamicPolicy(3, drafts=1), AlwaysOpen(), FLAT, [lambda prompt: Recorded(heard, prompt)])
    assert heard == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_the_vocabulary_of_the_traced_model() -> None:
    assert traced("llama")[2].vocabulary == VOCAB
