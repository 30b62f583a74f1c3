"""The prediction against the clock: what a gate gains, and which texts are decoded once more."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from memorized import answer, memorize
from tiny_models import prompt, tiny_model

from cerberus_ext.calibration import trace as trace_module
from cerberus_ext.calibration import validate as validate_module
from cerberus_ext.calibration.choice import PLAIN, Choice, Setting
from cerberus_ext.calibration.cost import StepCosts
from cerberus_ext.calibration.validate import Measured, gate_gain
from cerberus_ext.calibration.walk import Tally
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen
from cerberus_ext.drafting.static_policy import StaticPolicy

CHOICE = Choice("gate", "tree", {}, {"gate": Tally(tokens=105, seconds=1.0), "tree": Tally(tokens=100, seconds=1.0)})


@pytest.mark.parametrize(
    ("gated", "slower"),
    [
        ([0.95, 0.97, 0.95, 0.94], False),  # as foreseen, here and there
        ([0.99, 1.20, 0.90, 1.08], False),  # 4 % slower on these texts, but what one says another takes back
        ([1.06, 1.08, 1.07, 1.09], True),
        ([1.50], False),  # one text tells nothing of how texts differ
    ],
)
def test_a_gate_that_is_slower_beyond_noise(gated: list[float], slower: bool) -> None:
    """Over four texts that take a second without it; it was foreseen to need a twentieth less, as on all texts."""
    numbers = range(len(gated))
    alone = Measured(dict.fromkeys(numbers, 1.0), dict.fromkeys(numbers, 1.0))
    gain = gate_gain(
        CHOICE, {"tree": alone, "gate": Measured(dict(enumerate(gated)), dict.fromkeys(numbers, 1 / 1.05))}
    )
    assert gain is not None and gain.slower == slower
    assert gain.foreseen == 1.05 and gain.measured == pytest.approx(len(gated) / sum(gated))
    if len(gated) > 1:
        assert gain.interval is not None and gain.interval[0] <= gain.measured <= gain.interval[1]


def test_texts_on_which_a_gate_was_not_expected_to_help() -> None:
    """Two texts on which the clock agrees that the gate loses 10 %: on all texts it gains what was foreseen."""
    alone = Measured({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0})
    gain = gate_gain(CHOICE, {"tree": alone, "gate": Measured({0: 1.1, 1: 2.2}, {0: 1.1, 1: 2.2})})
    assert gain is not None and not gain.slower and gain.measured == pytest.approx(1.05)


def test_a_gate_over_plain_decoding() -> None:
    """Which has fewer texts."""
    alone = Measured({0: 1.0, 2: 1.0}, {0: 1.0, 2: 1.0})
    gated = Measured({0: 1.0, 1: 9.0, 2: 1.0}, dict.fromkeys(range(3), 1 / 1.05))
    gain = gate_gain(CHOICE, {"tree": alone, "gate": gated})
    assert gain is not None and gain.measured == pytest.approx(1.0)


def test_no_gate_no_gain() -> None:
    assert gate_gain(replace(CHOICE, chosen="tree"), {"tree": Measured({0: 1.0}, {0: 1.0})}) is None
    assert gate_gain(CHOICE, {}) is None, "nothing was validated"


def test_pace() -> None:
    """Four times as long as foreseen for as many tokens: midway it is twice as long."""
    measured = Measured({0: 3.0, 1: 5.0}, {0: 0.5, 1: 1.5}, tokens=30, predicted_tokens=30)
    assert measured.pace == 0.5


def test_validated_ways_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time another one is first; plain decoding has every other text."""
    model = tiny_model("llama")
    heads = memorize(model, [answer(model, prompt(), 24)])
    answers = [answer(model, prompt(length=length), 12) for length in (3, 5, 7)]
    texts = [(one, trace_module.trace(model, heads, one)) for one in answers]
    settings = {
        PLAIN: Setting(PLAIN, StaticPolicy.root(), AlwaysOpen()),
        "dynamic 2": Setting("dynamic", DynamicPolicy(2), AlwaysOpen()),
        "dynamic 4": Setting("dynamic", DynamicPolicy(4), AlwaysOpen()),
    }
    ran, real = [], validate_module.decode

    def watch(model: Any, heads: Any, ids: Any, **options: Any) -> Any:
        name = next(name for name, setting in settings.items() if setting.tree == options["tree"])
        ran.append((ids.shape[1], name))
        return real(model, heads, ids, **options)

    monkeypatch.setattr(validate_module, "decode", watch)
    flat = StepCosts((1, 4), (10,), (1.0,), ((1.0,), (1.0,)))
    found = validate_module.validate(model, heads, texts, settings, flat)
    lengths = [one.prompt for one in answers]
    assert ran[:3] == [(lengths[0], name) for name in settings], "to warm up"
    assert ran[3:] == [
        *[(lengths[0], name) for name in (PLAIN, "dynamic 2", "dynamic 4")],
        *[(lengths[1], name) for name in ("dynamic 2", "dynamic 4")],
        *[(lengths[2], name) for name in ("dynamic 4", PLAIN, "dynamic 2")],
    ]
    assert set(found[PLAIN].seconds) == {0, 2} and set(found["dynamic 2"].seconds) == {0, 1, 2}
    for name, one in found.items():
        row = one.row()
        assert row["same_texts"] and row["steps"] == row["predicted_steps"] and one.tokens == one.predicted_tokens
        assert row["predicted_tokens_per_second"] == pytest.approx(one.tokens / one.steps), "every step takes a second"
        assert row["texts"] == len(one.seconds) and (name != PLAIN or one.tokens == 2 * 11)


def test_what_is_foreseen_is_of_the_text_that_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which other steps may make another one at a near tie."""
    model = tiny_model("llama")
    one = answer(model, prompt(), 24)
    heads = memorize(model, [one])
    parted = replace(one, ids=torch.cat([one.ids[:, :-12], one.ids[:, one.prompt : one.prompt + 12]], 1))
    text = trace_module.trace(model, heads, parted)
    traced: list[Any] = []
    watched = lambda *args: traced.append(trace_module.trace(*args)) or traced[-1]  # noqa: E731
    monkeypatch.setattr(validate_module, "trace", watched)
    settings = {"dynamic 2": Setting("dynamic", DynamicPolicy(2), AlwaysOpen()),
                "dynamic 4": Setting("dynamic", DynamicPolicy(4), AlwaysOpen())}  # fmt: skip
    flat = StepCosts((1, 4), (10,), (1.0,), ((1.0,), (1.0,)))
    found = validate_module.validate(model, heads, [(parted, text)], settings, flat)
    assert [each.tokens for each in traced] == [one.ids[0].tolist()], "once for all that have this text"
    for measured in found.values():
        assert not measured.same_texts and measured.steps == measured.predicted_steps
        assert measured.tokens == measured.predicted_tokens == 23
