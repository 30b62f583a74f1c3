"""Which tree and gate win, where the answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from memorized import hand_made

from cerberus_ext.calibration.choice import GATE_GAIN, PLAIN, choose, halves
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.trace import TracedText
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.simulate import ABSENT
from cerberus_ext.drafting.static_policy import StaticPolicy

SIZES = (1, 2, 3, 4)


def costs(*seconds: float, asked: float = 0.0, entropy: float = 0.0) -> StepCosts:
    """Of 1, 2, 3 and 4 nodes, whatever the context. asked: what looking at the drafts costs."""
    looked = tuple((one + asked,) for one in seconds)
    return StepCosts(SIZES, (10,), seconds[:1], looked, entropy=entropy)


def certain(*best: float, places: int = 30) -> torch.Tensor:
    """(places, 2, 4): log-probabilities of both heads' drafts, the best one's as given."""
    return torch.tensor([*best, *[0.005] * (4 - len(best))]).log().expand(places, 2, 4).contiguous()


def chains(questions: int = 4) -> list[TracedText]:
    """The best drafts of both heads are always right."""
    return [hand_made([[0, 0]] * 30, question=number, logprobs=certain(0.9)) for number in range(questions)]


@pytest.mark.parametrize(
    ("seconds", "chosen", "rate"),
    [
        ((1.0, 1.0, 1.0, 1.1), "dynamic 3", 3.0),
        ((1.0, 1.2, 1.9, 2.0), "dynamic 2", 2 / 1.2),
        ((1.0, 2.5, 4.0, 4.0), PLAIN, 1.0),
    ],
)
def test_the_best_size(seconds: tuple[float, ...], chosen: str, rate: float) -> None:
    found = choose(chains(), costs(*seconds))
    assert found.chosen == found.best_ungated == chosen
    assert found.tallies[chosen].tokens_per_second == pytest.approx(rate)
    assert isinstance(found.settings[chosen].gate, AlwaysOpen)


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
    found = choose(texts, costs(1.0, 1.8, 3.0, 4.0))
    best = found.settings[found.chosen]
    assert found.best_ungated == PLAIN and isinstance(best.gate, gate)
    tally = found.tallies[found.chosen]
    assert tally.tokens_per_second == pytest.approx(4 / 3.8, rel=0.01)
    assert tally.gate_open_rate == pytest.approx(1 / 3, abs=0.01) and tally.zero_accept_steps == 0


@pytest.mark.parametrize("signal", ["entropy", "confidence"])
def test_a_gate_pays_for_asking(signal: str) -> None:
    """The same, but asking costs more than it gains: 0.2 in 3.8 for 3 steps."""
    texts = [told(signal, hits=10, question=number) for number in range(4)]
    assert choose(texts, costs(1.0, 1.8, 3.0, 4.0, asked=0.1, entropy=0.1)).chosen == PLAIN


def test_no_gate_for_a_small_gain() -> None:
    """1.8 + 2 * 1 against 4 is 5 %; with 1.97 it is less than 1 %, and the simpler one stays."""
    texts = [told("confidence", hits=10, question=number) for number in range(4)]
    found = choose(texts, costs(1.0, 1.97, 3.0, 4.0))
    best = found.tallies[found.best("confidence") or ""].tokens_per_second
    assert found.chosen == PLAIN and 1 < best / found.tallies[PLAIN].tokens_per_second < 1 + GATE_GAIN


def test_settings_are_judged_on_texts_that_they_were_not_fitted_on() -> None:
    """Both halves look alike, but what one teaches is wrong for the other: its first head is always right in one of
    them, and never in the other. Platt scaling that has seen only the one, or only the other, is of no use."""
    right = [hand_made([[0, ABSENT]] * 30, question=number, logprobs=certain(0.5)) for number in (0, 2)]
    wrong = [hand_made([[ABSENT, ABSENT]] * 30, question=number, logprobs=certain(0.5)) for number in (1, 3)]
    found = choose([*right, *wrong], costs(1.0, 1.5, 3.0, 4.0))
    # Where heads were always wrong, the gate stays closed; where they were right, it opens: both on the other half.
    gated = found.best("confidence")
    assert gated is not None and found.chosen == PLAIN
    tally = found.tallies[gated]
    assert 0 < tally.zero_accept_steps == tally.open_steps and tally.accepted == {0: tally.steps}


def test_halves() -> None:
    turns = [hand_made([[0]], question=number) for number in (0, 0, 1, 2, 5)]
    (fitted, judged), (other_fitted, other_judged) = halves(turns)
    assert [text.question for text in fitted] == [0, 0, 2] and [text.question for text in judged] == [1, 5]
    assert (fitted, judged) == (other_judged, other_fitted)
    assert halves(turns[:2]) == [(turns[:2], turns[:2])]


def test_heads_that_are_never_right() -> None:
    found = choose([hand_made([[ABSENT, ABSENT]] * 9)], costs(1.0, 1.1, 1.2, 1.3))
    assert found.chosen == PLAIN and found.settings[PLAIN].tree == StaticPolicy.root()
    assert list(choose(chains(), StepCosts((1,), (10,), (1.0,), ((1.0,),))).settings) == [PLAIN]


def repeating(question: int) -> TracedText:
    """Heads that are never right, and a text of 8 tokens, said five times."""
    text = hand_made([[ABSENT, ABSENT]] * 39, prompt=1, question=question)
    return replace(text, tokens=[*range(8)] * 5 + [0], prompt=1)


def test_a_text_that_repeats_itself() -> None:
    """Found out from the second time on. Nodes cost nothing, so the most win; where they cost much, a gate that
    sees what they promise wins."""
    texts = [repeating(number) for number in range(4)]
    cheap = choose(texts, costs(1.0, 1.0, 1.0, 1.0))
    assert cheap.chosen == cheap.best_ungated == "dynamic 4"
    assert cheap.tallies["dynamic 4"].tokens_per_step > 2
    dear = choose(texts, costs(1.0, 1.9, 2.4, 2.8))
    assert dear.settings[dear.chosen].kind == "confidence"
    assert dear.tallies[dear.chosen].tokens_per_second > 1.05 * dear.tallies[dear.best_ungated].tokens_per_second


def test_costs_between_and_beyond_what_was_measured() -> None:
    table = StepCosts((1, 3), (10, 30), (1.0, 2.0), ((5.0, 6.0), (7.0, 6.0)), entropy=0.5)
    expected = {0: 1.0, 10: 1.0, 20: 1.5, 30: 2.0, 50: 3.0, 5030: 252.0}
    assert {context: table.seconds(1, context, False) for context in expected} == pytest.approx(expected)
    assert table.seconds(1, 20, False, entropy=True) == pytest.approx(2.0)
    assert table.seconds(2, 20, True) == pytest.approx(6.0)
    assert table.seconds(3, 90, True) == 6.0, "longer texts are never faster than the longest measured"
    assert table.by_size(20) == pytest.approx({1: 5.5, 3: 6.5}) and table.plain_at(20) == pytest.approx(1.5)
    single = StepCosts((1,), (64,), (2.0,), ((3.0,),))
    assert single.seconds(1, 999, False) == 2.0 and math.isfinite(single.seconds(1, 0, True))
