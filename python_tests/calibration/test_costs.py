"""What `calibrate` times: the steps that `decode` takes."""

from __future__ import annotations

from typing import Any

import pytest
from memorized import answer, memorize, untrained
from tape import TapeRecorder
from tiny_models import prompt, tiny_model

from cerberus_ext.calibration import cost
from cerberus_ext.calibration.cost import measure_costs
from cerberus_ext.runtime.recorder import RECORDERS
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stepper import Stepper


@pytest.mark.parametrize("recorded", [False, True])
def test_costs_are_measured_with_the_steps_of_decode(recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where steps are replayed; then steps for which the host looks at the drafts have recordings of their own."""
    model = tiny_model("llama")
    if recorded:
        monkeypatch.setitem(RECORDERS, "cpu", lambda device: TapeRecorder())
        runtime_of(model).release()
    heads = memorize(model, [answer(model, prompt(), 24)], steps=1)
    timed: list[tuple[bool, int, int]] = []
    real = Stepper.step

    def watch(stepper: Stepper, tree: Any) -> Any:
        timed.append((stepper._drafts.looks, tree.size, stepper.target.cache.committed))
        graphed = stepper.stats.graphed_steps
        chunk = real(stepper, tree)
        assert stepper.stats.graphed_steps == graphed + recorded
        assert stepper.stats.trace[-1][0] == tree.size
        return chunk

    monkeypatch.setattr(Stepper, "step", watch)
    before = model.config._attn_implementation
    found = measure_costs(model, heads, [1, 3, 4, 70], [20, 40], rounds=2)
    runtime_of(model).release()
    expected = {(True, size, context) for size in (1, 3, 4, 70) for context in (20, 40)}
    expected |= {(False, 1, context) for context in (20, 40)}
    assert set(timed) == expected and len(timed) == len(expected) * cost.PASSES * 3 * (1 + cost._IN_A_ROW)
    assert found.sizes == (1, 3, 4, 70) and found.contexts == (20, 40)
    assert all(seconds > 0 for row in (found.plain, *found.looked) for seconds in row)
    assert 0 < found.entropy < 0.01 and found.spread >= 0
    assert model.config._attn_implementation == before and not model.lm_head._forward_pre_hooks


def test_medians_and_looking_is_never_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def time_step(stepper: Any, gate: Any, policy: Any, trees: Any, context: int) -> float:
        nonlocal calls
        calls += 1
        looks = isinstance(gate, cost._Answering)
        seconds = (gate.answer if looks else 1) + context / 100 - 0.5 * looks
        return 1000.0 if calls % 7 == 0 else seconds  # now and then the machine does something else

    monkeypatch.setattr(cost, "_time_step", time_step)
    model = tiny_model("llama")
    found = measure_costs(model, untrained(model), [1, 3], [20, 40], rounds=3)
    assert found.plain == (1.2, 1.4) and found.looked == ((1.2, 1.4), (2.7, 2.9))


def test_costs_of_plain_steps_alone() -> None:
    model = tiny_model("llama")
    found = measure_costs(model, untrained(model), [1], [16], rounds=1)
    assert found.sizes == (1,) and 0 < found.plain[0] <= found.looked[0][0]
