"""Which tree and gate win, where the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from memorized import hand_made

from cerberus_ext.calibration.choice import GATE_GAIN, PLAIN, Fit, choose, halves
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import TracedText
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.simulate import ABSENT
from cerberus_ext.drafting.static_policy import StaticPolicy

SIZES = (1, 2, 3, 4)


def costs(*seconds: float, asked: float = 0.0, entropy: float = 0.0) -> StepCosts:
    """Of 1, 2, 3 and 4 nodes, whatever the context."""
    return StepCosts(SIZES, (10,), tuple((s,) for s in seconds), tuple((s + asked,) for s in seconds), entropy=entropy)


def chains(questions: int = 4) -> list[TracedText]:
    """The best drafts of both heads are always right."""
    return [hand_made([[0, 0]] * 30, question=number) for number in range(questions)]


@pytest.mark.parametrize(
    ("seconds", "chosen", "rate"),
    [
        ((1.0, 1.0, 1.0, 1.0), "open 3", 3.0),
        ((1.0, 1.2, 1.9, 2.0), "open 2", 2 / 1.2),
        ((1.0, 2.5, 4.0, 4.0), PLAIN, 1.0),
    ],
)
def test_the_best_size(seconds: tuple[float, ...], chosen: str, rate: float) -> None:
    found = choose(chains(), SIZES, costs(*seconds))
    assert found.chosen == found.best_ungated == chosen
    assert found.tallies[chosen].tokens_per_second == pytest.approx(rate)
    assert isinstance(found.settings[chosen].gate, AlwaysOpen)
    assert "open 4" not in found.settings, "there are only two right paths"


def told(signal: str, *, hits: int, places: int = 40, question: int = 0) -> TracedText:
    """The first draft is right at the first of every `places // hits` places, and a signal tells so."""
    every = places // hits
    right = [place % every == 0 for place in range(places)]
    # What follows a right draft is a place that is never visited; places without one come one by one.
    ranks = [[0, ABSENT] if hit else [ABSENT, ABSENT] for hit in right]
    values: dict = {}
    if signal == "entropy":
        values["entropy"] = [1.0 if hit else 5.0 for hit in right]
    else:
        p = torch.tensor([[0.98, 0.005, 0.005, 0.005] if hit else [0.02, 0.02, 0.02, 0.02] for hit in right])
        values["logprobs"] = p[:, None].expand(-1, 2, -1).log().contiguous()
    return hand_made(ranks, question=question, **values)


@pytest.mark.parametrize(("signal", "gate"), [("entropy", EntropyGate), ("confidence", ConfidenceGate)])
def test_a_gate_that_knows_wins(signal: str, gate: type) -> None:
    texts = [told(signal, hits=10, question=number) for number in range(4)]
    # Per 4 places: a hit, and two steps without one. Always open: 4 tokens in 3 * 1.8; gated: in 1.8 + 2 * 1; plain: 4.
    found = choose(texts, SIZES, costs(1.0, 1.8, 3.0, 4.0))
    best = found.settings[found.chosen]
    assert found.best_ungated == PLAIN and isinstance(best.gate, gate)
    tally = found.tallies[found.chosen]
    assert tally.tokens_per_second == pytest.approx(4 / 3.8, rel=0.01)
    assert tally.gate_open_rate == pytest.approx(1 / 3, abs=0.01) and tally.zero_accept_steps == 0


@pytest.mark.parametrize("signal", ["entropy", "confidence"])
def test_a_gate_pays_for_asking(signal: str) -> None:
    """The same, but asking costs more than it gains: 0.2 in 3.8 for 3 steps."""
    texts = [told(signal, hits=10, question=number) for number in range(4)]
    assert choose(texts, SIZES, costs(1.0, 1.8, 3.0, 4.0, asked=0.1, entropy=0.1)).chosen == PLAIN


def test_no_gate_for_a_small_gain() -> None:
    """1.8 + 2 * 1 against 4 is 5 %; with 1.97 it is less than 1 %, and the simpler one stays."""
    texts = [told("confidence", hits=10, question=number) for number in range(4)]
    found = choose(texts, SIZES, costs(1.0, 1.97, 3.0, 4.0))
    best = found.tallies[found.best("confidence") or ""].tokens_per_second
    assert found.chosen == PLAIN and 1 < best / found.tallies[PLAIN].tokens_per_second < 1 + GATE_GAIN


def test_a_gate_of_compiled_steps_chooses_among_compiled_sizes() -> None:
    sizes, seconds = (1, 2, 4, 6, 8, 12), tuple((float(nodes),) for nodes in range(6, 12))
    table = StepCosts(sizes, (10,), seconds, seconds)
    for compiled, among in ((False, sizes), (True, (1, 4, 8, 12))):
        found = Fit(chains(), sizes).settings(replace(table, compiled=compiled))
        gates = [setting for setting in found.values() if setting.kind == "dynamic gate"]
        assert gates and all(tuple(one.gate.costs) == among and one.tree.size == 12 for one in gates)


def test_trees_are_judged_on_texts_that_they_were_not_made_of() -> None:
    """Each half is right along paths of its own: trees of one half are worth nothing on the other."""
    texts = [hand_made([[number % 2, ABSENT]] * 30, question=number) for number in range(4)]
    found = choose(texts, (1, 2), costs(1.0, 1.0, 1.0, 1.0))
    assert found.tallies["open 2"].tokens_per_step == 1.0
    assert found.best("open") == PLAIN
    assert found.settings["open 2"].tree == StaticPolicy.from_paths([(0,)]), "made of all texts"


def test_shapes_are_long_where_the_heads_are_certain_and_wide_where_not() -> None:
    certain, unsure = [[0, 0, 0]] * 10, [[0, ABSENT, ABSENT], [1, ABSENT, ABSENT], [2, ABSENT, ABSENT]] * 6
    head1 = torch.tensor([0.9] * 10 + [0.3] * 18)
    logprobs = head1[:, None, None].expand(-1, 3, 4).log()
    fit = Fit([hand_made(certain + unsure, logprobs=logprobs)], (1, 2, 4))
    assert fit.shapes(4) == (
        StaticPolicy.chain(1),
        StaticPolicy.chain(3),  # of all places and of the certain ones
        StaticPolicy.from_widths([3]),
    )
    assert fit.shapes(2) == (StaticPolicy.chain(1),) and Fit([hand_made([[ABSENT]])], (1, 2)).shapes(9) == ()


def test_halves() -> None:
    turns = [hand_made([[0]], question=number) for number in (0, 0, 1, 2, 5)]
    (fitted, judged), (other_fitted, other_judged) = halves(turns)
    assert [text.question for text in fitted] == [0, 0, 2] and [text.question for text in judged] == [1, 5]
    assert (fitted, judged) == (other_judged, other_fitted)
    assert halves(turns[:2]) == [(turns[:2], turns[:2])]


def test_heads_that_are_never_right() -> None:
    found = choose([hand_made([[ABSENT, ABSENT]] * 9)], SIZES, costs(1.0, 1.0, 1.0, 1.0))
    assert found.chosen == PLAIN and [name for name, one in found.settings.items() if one.kind == "open"] == [PLAIN]
    assert Fit([hand_made([[ABSENT]])], [1, 8]).trees == {1: StaticPolicy.root()}


def repeating(question: int) -> TracedText:
    """Heads that are never right, and a text of 8 tokens, said five times."""
    text = hand_made([[ABSENT, ABSENT]] * 39, prompt=1, question=question)
    return replace(text, tokens=[*range(8)] * 5 + [0], prompt=1)


def test_a_text_that_repeats_itself() -> None:
    """Found out from the second time on. Nodes cost nothing, so the most win; where they cost much, a gate that
    sees what they promise wins."""
    texts = [repeating(number) for number in range(4)]
    cheap = choose(texts, SIZES, costs(1.0, 1.0, 1.0, 1.0))
    assert cheap.chosen == cheap.best_ungated == "dynamic 4"
    assert cheap.tallies["dynamic 4"].tokens_per_step > 2
    dear = choose(texts, SIZES, costs(1.0, 1.9, 2.4, 2.8))
    assert dear.settings[dear.chosen].kind == "dynamic gate"
    assert dear.tallies[dear.chosen].tokens_per_second > 1.05 * dear.tallies[dear.best_ungated].tokens_per_second


def test_costs_between_and_beyond_what_was_measured() -> None:
    table = StepCosts((1, 3), (10, 30), ((1.0, 2.0), (3.0, 4.0)), ((5.0, 6.0), (7.0, 6.0)), entropy=0.5)
    expected = {0: 1.0, 10: 1.0, 20: 1.5, 30: 2.0, 50: 3.0, 5030: 252.0}
    assert {context: table.seconds(1, context, False) for context in expected} == pytest.approx(expected)
    assert table.seconds(2, 20, False) == pytest.approx(2.5)
    assert table.seconds(2, 20, False, entropy=True) == pytest.approx(3.0)
    assert table.seconds(3, 90, True) == 6.0, "longer texts are never faster than the longest measured"
    assert table.by_size(20, asked=False) == pytest.approx({1: 1.5, 3: 3.5})
    single = StepCosts((1,), (64,), ((2.0,),), ((3.0,),))
    assert single.seconds(1, 999, False) == 2.0 and math.isfinite(single.seconds(1, 0, True))
