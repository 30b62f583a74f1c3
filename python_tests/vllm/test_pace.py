"""The time of vLLM's steps as a line, and when a draft pays by it."""

from __future__ import annotations

import random

import pytest

from cerberus_ext.vllm.pace import Pace


def seen(steps: list[tuple[int, int, int, float]]) -> Pace:
    pace = Pace()
    for step in steps:
        pace.observe(*step)
    return pace


def steps_of_line(fixed: float, each: float, count: int = 200, noise: float = 0.0) -> list[tuple[int, int, int, float]]:
    draw = random.Random(0)
    found = []
    for _ in range(count):
        rows, drafts = draw.randrange(1, 9), draw.randrange(0, 20)
        seconds = (fixed + each * (rows + drafts)) * (1 + noise * draw.uniform(-1, 1))
        found.append((rows, drafts, rows + drafts // 2, seconds))
    return found


def test_before_anything_is_known() -> None:
    assert Pace().line() == (16.0, 1.0)
    assert [Pace().least_probability(rows) for rows in (0, 1, 16)] == [0.0, 1 / 17, 0.5]


@pytest.mark.parametrize(("fixed", "each"), [(0.026, 0.0018), (1.0, 0.001), (0.001, 1.0)])
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_line_is_found(fixed: float, each: float, noise: float) -> None:
    found = seen(steps_of_line(fixed, each, noise=noise)).line()
    size = 4.5 + 9.5
    assert found[0] + size * found[1] == pytest.approx(fixed + size * each, rel=0.1)
    assert found[1] == pytest.approx(each, rel=0.3, abs=0.1 * fixed / size)


def test_steps_of_one_size_say_nothing_about_a_token() -> None:
    fixed, each = seen([(4, 0, 4, 1.0)] * 100).line()
    assert each == pytest.approx(1 / 20) and fixed + 4 * each == pytest.approx(1)


def test_the_line_never_falls_and_never_starts_below_zero() -> None:
    for steps in ([(1, 0, 1, 5.0), (1, 8, 1, 1.0)] * 50, [(1, 0, 1, 0.1), (1, 8, 1, 90.0)] * 50):
        fixed, each = seen(steps).line()
        assert fixed >= 0 and each >= 0 and 0 <= seen(steps).least_probability(3) <= 9


def test_a_step_that_took_strangely_long_counts_little() -> None:
    steps = steps_of_line(1.0, 0.05)
    calm, disturbed = seen(steps), seen(steps)
    rows, drafts, gained, seconds = steps[0]
    calm.observe(rows, drafts, gained, seconds)
    disturbed.observe(rows, drafts, gained, 1000 * seconds)
    assert disturbed.least_probability(1) == pytest.approx(calm.least_probability(1), rel=0.2)


def test_a_machine_that_gets_slower_is_followed() -> None:
    pace = seen([*steps_of_line(1.0, 0.05), *steps_of_line(10.0, 0.5, 600)])
    assert pace.line() == (pytest.approx(10.0, rel=0.05), pytest.approx(0.5, rel=0.05))


def test_a_draft_has_to_bring_what_its_time_brings_otherwise() -> None:
    """By hand: a step takes 10 + t, two rows gain 3 tokens with one draft each: 6 tokens in 14."""
    pace = Pace()
    for rows, drafts in ((1, 1), (3, 3), (1, 1), (3, 3)) * 500:
        pace.observe(rows, drafts, 3 * rows, 10.0 + rows + drafts)
    assert pace.least_probability(2) == pytest.approx(6 / 14, rel=0.05)
    assert pace.least_probability(1) == pytest.approx(3 / 12, rel=0.05)
