"""What `calibrate` times: the steps that `decode` takes."""

from __future__ import annotations

from typing import Any

import pytest
from memorized import answer, memorize, untrained
from tape import TapeRecorder
from tiny_models import prompt, tiny_model

from cerberus_ext.calibration import cost
from cerberus_ext.calibration.cost import measure_costs
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.runtime import graphs


@pytest.mark.parametrize("recorded", [False, True])
def test_costs_are_measured_with_the_steps_of_decode(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps are replayed; then a gate that looks at the drafts needs recordings of its own."""
    if recorded:
        monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda device: TapeRecorder())
        graphs._kept.clear()
    model = tiny_model("llama")
    heads = memorize(model, [answer(model, prompt(), 24)], steps=1)
    timed: list[tuple[bool, int, int]] = []
    real = cost.take_step

    def watch(stepper: Any, gate: Any, tree: StaticPolicy, deepest: int) -> list[int]:
        timed.append((type(gate).__name__ == "_Answering", tree.size, stepper.base.cache.committed))
        graphed = stepper.stats.graphed_steps
        nodes = len(stepper.stats.trace)
        gained = real(stepper, gate, tree, deepest)
        assert stepper.stats.graphed_steps == graphed + recorded
        assert stepper.stats.trace[nodes][0] == tree.size
        return gained

    monkeypatch.setattr(cost, "take_step", watch)
    trees = {1: StaticPolicy.root(), 3: StaticPolicy.chain(2), 4: StaticPolicy.from_widths([3])}
    before = model.config._attn_implementation
    found = measure_costs(model, heads, trees, [40, 20], rounds=2)
    graphs._kept.clear()
    expected = {(asked, size, context) for asked in (False, True) for size in trees for context in (20, 40)}
    assert set(timed) == expected and len(timed) == len(expected) * cost.PASSES * 3 * (1 + cost._IN_A_ROW)
    assert found.sizes == (1, 3, 4) and found.contexts == (20, 40)
    assert all(seconds > 0 for table in (found.open, found.asked) for row in table for seconds in row)
    assert 0 < found.entropy < 0.01 and found.spread >= 0
    assert model.config._attn_implementation == before and not model.lm_head._forward_pre_hooks


def test_medians_and_looking_is_never_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def time_step(stepper: Any, gate: Any, tree: StaticPolicy, context: int) -> float:
        nonlocal calls
        calls += 1
        seconds = tree.size + context / 100 - 0.5 * (type(gate).__name__ == "_Answering" and tree.size > 1)
        return 1000.0 if calls % 7 == 0 else seconds  # now and then the machine does something else

    monkeypatch.setattr(cost, "_time_step", time_step)
    model = tiny_model("llama")
    trees = {1: StaticPolicy.root(), 3: StaticPolicy.chain(2)}
    found = measure_costs(model, untrained(model), trees, [20, 40], rounds=3)
    assert found.open == found.asked == ((1.2, 1.4), (3.2, 3.4))


def test_costs_of_heads_without_a_right_draft() -> None:
    model = tiny_model("llama")
    found = measure_costs(model, untrained(model), {1: StaticPolicy.root()}, [16], rounds=1)
    assert found.sizes == (1,) and found.asked == found.open
