"""The walk through a traced text takes the steps of `decode`, one by one."""

from __future__ import annotations

from functools import cache
from statistics import median

import pytest
import torch
from memorized import answer, hand_made, memorize
from tiny_models import VOCAB, prompt, tiny_model

from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import Answer, TracedText, trace
from cerberus_ext.calibration.walk import accepted_lengths, walk
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from cerberus_ext.drafting.heads import CerberusConfig, CerberusHeads
from cerberus_ext.drafting.simulate import ABSENT
from cerberus_ext.engine.decode import decode

NEW = 80  # more than one piece of the pass over a text
TREE = DynamicPolicy(16)
TREES = {"small": DynamicPolicy(3), "one draft": DynamicPolicy(16, drafts=1), "16": TREE}
COSTS = {1: 1.0, 2: 1.4, 16: 2.5}
FLAT = StepCosts((1, 17), (10,), (1.0,), ((1.0,), (1.0,)))


@cache
def traced(name: str, dtype: torch.dtype = torch.float32) -> tuple[CerberusHeads, Answer, TracedText]:
    model = tiny_model(name, "cpu", dtype)
    other = torch.randint(VOCAB, (1, 7), generator=torch.Generator().manual_seed(5))
    ids = prompt()
    learned = answer(model, other, NEW)
    found = answer(model, ids, NEW)
    # Knows another text, and the second half of this one.
    half = Answer(0, found.ids[:, : found.prompt + NEW // 2], found.prompt, NEW // 2)
    heads = memorize(model, [learned, half])
    return heads, found, trace(model, heads, found)


def gates(text: TracedText) -> dict[str, Gate]:
    return {
        "open": AlwaysOpen(),
        "closed": AlwaysClosed(),
        "entropy": EntropyGate(median(text.entropy)),
        "confidence": ConfidenceGate(COSTS, margin=0.4),
        "confidence, rate": ConfidenceGate(COSTS, rate=1.4),
    }


def same_steps(name: str, dtype: torch.dtype, tree: DynamicPolicy, kind: str, new: int = NEW) -> None:
    heads, found, text = traced(name, dtype)
    if new != NEW:
        short = Answer(0, found.ids[:, : found.prompt + new], found.prompt, new)
        text = trace(tiny_model(name, "cpu", dtype), heads, short)
    gate = gates(text)[kind]
    model = tiny_model(name, "cpu", dtype)
    options = {"tree": tree, "gate": gate, "proposers": ()}
    stats = decode(model, heads, found.ids[:, : found.prompt], max_new_tokens=new, **options).stats
    tally = walk([text], tree, gate, FLAT, ())
    assert (tally.steps, tally.open_steps, tally.zero_accept_steps) == (
        stats.steps,
        stats.open_steps,
        stats.zero_accept_steps,
    )
    assert tally.tokens == stats.new_tokens - 1 and tally.tokens_per_step == stats.tokens_per_step
    assert tally.gate_open_rate == stats.gate_open_rate and tally.zero_accept_rate == stats.zero_accept_rate


@pytest.mark.parametrize("kind", gates(hand_made([[0]])))
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
def test_same_steps_as_decode(name: str, tree: str, kind: str) -> None:
    same_steps(name, torch.float32, TREES[tree], kind)


@pytest.mark.parametrize("kind", ["open", "entropy", "confidence, rate"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_steps_in_16_bits(dtype: torch.dtype, kind: str) -> None:
    """Threshold and probabilities have the same bits in the pass over the text as in a step."""
    same_steps("llama", dtype, TREE, kind)


@pytest.mark.parametrize("new", [2, 3, 4, 64, 65, 66, 67])
def test_same_steps_in_short_texts(new: int) -> None:
    same_steps("llama", torch.float32, TREE, "open", new)


def test_these_texts_have_steps_of_every_kind() -> None:
    """Else the tests above would prove little."""
    for name in ("llama", "qwen2-window"):
        _, _, text = traced(name)
        assert set(accepted_lengths(text, TREE)) == {0, 1, 2, 3}
        for kind, gate in gates(text).items():
            tally = walk([text], TREE, gate, FLAT, ())
            assert kind == "closed" or tally.tokens_per_step > 1.05
            assert kind in ("open", "closed") or 0.1 < tally.gate_open_rate < 0.95, (name, kind, tally)
        assert text.agreeing == 1.0


def test_up_to_the_last_position() -> None:
    """gpt2 has 96 positions: near them trees are cut, and at the end there are none."""
    model, ids = tiny_model("gpt2"), prompt(length=80)
    found = answer(model, ids, 17)
    heads = memorize(model, [found])
    text = trace(model, heads, found)
    assert text.deepest == [15 - place for place in range(16)]
    stats = decode(model, heads, ids, max_new_tokens=17, tree=TREE, proposers=()).stats
    tally = walk([text], TREE, AlwaysOpen(), FLAT, ())
    assert (tally.steps, tally.open_steps) == (stats.steps, stats.open_steps) and tally.tokens_per_step > 1.5


def test_beyond_the_last_position() -> None:
    model, ids = tiny_model("llama"), prompt(length=250)
    found = answer(model, ids, 20)
    heads = memorize(model, [found])
    text = trace(model, heads, found)
    assert text.deepest == [5, 4, 3, 2, 1, *[0] * 14]
    stats = decode(model, heads, ids, max_new_tokens=20, tree=TREE, proposers=()).stats
    tally = walk([text], TREE, AlwaysOpen(), FLAT, ())
    assert (tally.steps, tally.open_steps) == (stats.steps, stats.open_steps)


def test_a_text_that_ends_by_itself() -> None:
    """Also in the middle of what a step accepts."""
    heads, found, _ = traced("llama")
    model, ids = tiny_model("llama"), found.ids[:, : found.prompt]
    tokens = found.ids[0, found.prompt :].tolist()
    places = [place for place in range(1, 40) if tokens[place] not in tokens[:place]]
    for place in places:
        out = decode(model, heads, ids, max_new_tokens=NEW, tree=TREE, proposers=(), eos_token_id=tokens[place])
        ended = Answer(0, out.sequences, found.prompt, NEW)
        tally = walk([trace(model, heads, ended)], TREE, AlwaysOpen(), FLAT, ())
        assert (tally.steps, tally.tokens) == (out.stats.steps, place)
    assert len(places) > 4


def test_draft_vocabulary() -> None:
    """Tokens that the heads cannot draft are absent, others are found by the model's ids."""
    model = tiny_model("llama")
    heads, found, text = traced("llama")
    small = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3, draft_vocab=50))
    small.load_state_dict({**heads.state_dict(), "draft_vocab": torch.arange(0, 100, 2)})
    drafted = trace(model, small, found)
    tokens = found.ids[0, found.prompt :].tolist()
    for place, row in enumerate(drafted.ranks):
        for head, rank in enumerate(row):
            follows = tokens[place + head + 1] if place + head + 1 < len(tokens) else None
            if follows is None or follows % 2:
                assert rank == ABSENT
    stats = decode(model, small, found.ids[:, : found.prompt], max_new_tokens=NEW, tree=TREE, proposers=()).stats
    assert walk([drafted], TREE, AlwaysOpen(), FLAT, ()).steps == stats.steps
    assert any(rank == 0 for row in drafted.ranks for rank in row)
