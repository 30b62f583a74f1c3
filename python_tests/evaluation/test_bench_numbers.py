"""The numbers of a report, from results written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama

from cerberus_ext.evaluation import texts
from cerberus_ext.evaluation.bootstrap import bootstrap_interval, median_of_ratios, ratio_of_totals
from cerberus_ext.evaluation.numbers import summarize, typical_rounds
from cerberus_ext.evaluation.results import Results
from cerberus_ext.evaluation.tables import markdown
from cerberus_ext.runtime.stats import DecodeStats

NAMES = ["autoregressive", "generate", "medusa", "cerberus"]


def stats(histogram: list[int], open_steps: int, prefill: float = 0.25) -> dict[str, Any]:
    steps = sum(histogram)
    return {
        "steps": steps,
        "open_steps": open_steps,
        "zero_accept_steps": histogram[0] - (steps - open_steps),
        "step_tokens": sum((accepted + 1) * count for accepted, count in enumerate(histogram)),
        "accepted_histogram": histogram,
        "trace": [[8 if step < open_steps else 1, []] for step in range(steps)],
        "seconds": {"prefill": prefill, "draft": 0.125, "verify": 0.5, "commit": 0.125},
    }


# question, category -> way -> tokens, seconds, statistics
MADE = {
    ("1", "x"): {
        "autoregressive": (10, 2.0, stats([9], 0)),
        "generate": (10, 4.0, None),
        "medusa": (10, 2.0, stats([3, 3], 6)),
        "cerberus": (10, 1.0, stats([1, 2, 1], 4)),
    },
    ("2", "y"): {
        "autoregressive": (30, 6.0, stats([29], 0)),
        "generate": (30, 3.0, None),
        "medusa": (30, 6.0, stats([29], 29)),
        "cerberus": (30, 2.0, stats([6, 4, 5], 12)),
    },
}


def results(file: Path, dtype: str = "float32", parts: dict[str, Any] | None = None, **about: Any) -> Results:
    found = Results(file)
    identity = {
        "model": "m", "heads": "h", "questions": "q", "dtype": dtype, "device": "cpu", "turns": [1], "new_tokens": 30,
        "rounds": 1, "seed": 0, "ways": dict.fromkeys(NAMES, "a way"), "machine": {}, "versions": {},
    }  # fmt: skip
    found.begin(identity, {"date": "today", "commit": None, "command": "c", "left_out": {}, "expected": {}, **about})
    for (question, category), ways in MADE.items():
        for way, (tokens, seconds, counted) in ways.items():
            found.add(
                f"{question}/1/0/{way}", question=question, category=category, turn=1, round=0, way=way,
                prompt_tokens=3, tokens=[5] * tokens, seconds=seconds, stats=counted,
            )  # fmt: skip
        found.add(f"{question}/1/0", parts=parts or {}, asked=None, pieces=None)
    return Results(file)  # as it is read back


def test_speeds(tmp_path: Path) -> None:
    ways = summarize(results(tmp_path / "r"))["ways"]
    assert [ways[name]["all"]["tokens_per_second"] for name in NAMES] == [5, 40 / 7, 5, pytest.approx(40 / 3)]
    over = ways["cerberus"]["all"]["over"]
    assert over["autoregressive"]["total"] == pytest.approx(8 / 3)
    assert over["autoregressive"]["median"] == pytest.approx((2 + 3) / 2)
    assert over["autoregressive"]["total_interval"] == pytest.approx([2, 3])  # one of the two questions, twice
    assert over["generate"]["total"] == pytest.approx(7 / 3)
    assert over["generate"]["median"] == pytest.approx((4 + 1.5) / 2)
    assert ways["cerberus"]["y"]["over"]["generate"] == {
        "total": pytest.approx(1.5), "total_interval": None, "median": pytest.approx(1.5), "median_interval": None,
    }  # fmt: skip
    assert ways["autoregressive"]["all"]["over"]["autoregressive"]["total_interval"] == (1, 1)


def test_steps(tmp_path: Path) -> None:
    ways = summarize(results(tmp_path / "r"))["ways"]
    assert "decode" not in ways["generate"]["all"]
    found = ways["cerberus"]["all"]["decode"]
    assert found["accepted_histogram"] == [7, 6, 6] and found["steps"] == 19
    assert found["tokens_per_step"] == pytest.approx((7 + 12 + 18) / 19)
    assert found["gate_open_rate"] == pytest.approx(16 / 19)
    assert found["nodes_per_step"] == pytest.approx((16 * 8 + 3) / 19)
    assert found["accepts_nothing"] == pytest.approx((1 + 3) / 16)  # three of the steps were closed
    assert found["seconds"] == {"prefill": 0.5, "draft": 0.25, "verify": 1.0, "rest": pytest.approx(3 - 1.75)}
    assert found["tokens_per_second"] == pytest.approx((40 - 2) / (2 * 0.75))
    assert ways["autoregressive"]["x"]["decode"]["accepts_nothing"] is None


def test_over_medusa(tmp_path: Path) -> None:
    found = summarize(results(tmp_path / "r"))["over_medusa"]
    assert list(found) == ["cerberus"]
    assert found["cerberus"]["x"]["total"] == pytest.approx((8 / 4) / (9 / 6))
    assert found["cerberus"]["all"]["total"] == pytest.approx((37 / 19) / (38 / 35))


def test_foreseen(tmp_path: Path) -> None:
    found = summarize(results(tmp_path / "r", expected={"cerberus": 38.0, "generate": 4.0}))["expected"]
    assert found["cerberus"]["deviation_percent"] == pytest.approx(50)  # measured: 38 tokens in 1.5 s behind the prompt
    assert found["generate"]["deviation_percent"] == pytest.approx((4 * 7 / 40 - 1) * 100)


def test_markdown(tmp_path: Path) -> None:
    text = markdown(summarize(results(tmp_path / "r", expected={"cerberus": 38.0})))
    assert "| cerberus | 13.3 | 2.67x (2.00 - 3.00) [2.50x] | 2.33x (1.50 - 4.00) [2.75x] | 1.95 | 6.9 |" in text
    assert "| cerberus | 25.3 | 1.95 | 6.9 | 25% | 84% | 0.5 | 0.2 | 1.0 | 1.2 |" in text
    assert "| cerberus | 38.0 | 25.3 | +50.0 % |" in text
    assert "| cerberus | 36.8% | 31.6% | 31.6% |" in text
    nodes = text.partition("## Nodes a step, by category\n\n")[2].partition("\n\n")[0]
    assert nodes.splitlines()[-1] == "| cerberus | 6.9 | 8.0 | 6.6 |"


def test_rounds_with_the_median_time() -> None:
    rows = [{"question": "1", "turn": 1, "seconds": seconds} for seconds in (3.0, 1.0, 2.0, 9.0)]
    rows.append({"question": "1", "turn": 2, "seconds": 7.0})
    assert [row["seconds"] for row in typical_rounds(rows)] == [2.0, 7.0]


# ---------------------------------------------------------------- intervals


def test_a_ratio_that_is_the_same_everywhere_has_no_width() -> None:
    rows = np.array([[2.0, 1.0, 1.0, 1.0]]) * np.arange(1, 20)[:, None]
    for statistic in (ratio_of_totals, median_of_ratios):
        assert statistic(rows) == 2
        assert bootstrap_interval(statistic, rows) == pytest.approx((2, 2))


def test_an_interval_is_that_of_the_mean() -> None:
    """Of many values it is what the normal distribution says."""
    values = np.random.default_rng(0).normal(5, 1, size=400)
    low, high = bootstrap_interval(lambda rows: rows[..., 0].mean(-1), values[:, None], seed=1)
    width = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - width, abs=0.02)
    assert high == pytest.approx(values.mean() + width, abs=0.02)


def test_intervals_follow_from_the_seed() -> None:
    rows = np.random.default_rng(0).uniform(1, 2, size=(9, 4))
    found = [bootstrap_interval(ratio_of_totals, rows, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


def test_one_question_has_no_interval() -> None:
    assert bootstrap_interval(ratio_of_totals, np.ones((1, 4))) is None


# ---------------------------------------------------------------- equality


def part(gap: float | None, exact: bool = False) -> dict[str, Any]:
    return {
        "new_token": 3, "got": 1, "want": 2, "gap": gap, "largest": 16.0, "other": "autoregressive", "exact": exact
    }  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "gap", "near"),
    [
        ("float32", 0.0, False),
        ("bfloat16", 0.5, True),  # 4 units of 2^-7 of 16
        ("bfloat16", 0.51, False),
        ("float16", 0.0625, True),
        ("float16", 0.063, False),
        ("bfloat16", None, False),
    ],
)
def test_near_ties(dtype: str, gap: float | None, near: bool) -> None:
    assert texts.is_near_tie(part(gap), getattr(torch, dtype)) == near


@pytest.mark.parametrize(
    ("dtype", "way", "exact", "gap", "violations"),
    [
        ("bfloat16", "generate", False, 0.4, 0),
        ("bfloat16", "generate", False, 0.6, 2),
        ("bfloat16", "cerberus", True, 0.0, 2),  # on a CPU `decode` is the same to the bit
        ("float32", "generate", False, 1e-6, 2),
    ],
)
def test_violations(dtype: str, way: str, exact: bool, gap: float, violations: int, tmp_path: Path) -> None:
    found = summarize(results(tmp_path / "r", dtype, {way: part(gap, exact)}))["equality"]
    assert len(found["violations"]) == violations
    assert found["different"] == {**dict.fromkeys(NAMES, 0), way: 2} and found["largest_gap"][way] == gap


@pytest.mark.parametrize(("exact", "violations"), [(True, 2), (False, 0)])
def test_near_ties_of_rounding(exact: bool, violations: int, tmp_path: Path) -> None:
    """They are right where a way has not to be the same to the bit."""
    parted = {"cerberus": part(0.4, exact)}
    found = summarize(results(tmp_path / "r", "bfloat16", parted))["equality"]
    assert len(found["violations"]) == violations and found["different"] == {**dict.fromkeys(NAMES, 0), "cerberus": 2}


def test_difference_is_measured_from_the_worse_of_both_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
        assert ids.tolist() == [[7, 8, 1]]
        return torch.tensor([0.0, 2.0, 5.0, 4.5, -9.0])

    monkeypatch.setattr(texts, "last_logits", last_logits)

    def found(got: list[int], want: list[int]) -> Any:
        return texts.difference(Any, torch.tensor([[7, 8, *got]]), torch.tensor([[7, 8, *want]]), 2)  # type: ignore[arg-type]

    assert found([1, 2, 0], [1, 2, 0]) is None
    assert found([1, 1, 0], [1, 2, 0]) == {
        "new_token": 1, "got": 1, "want": 2, "gap": 3.0, "largest": 9.0
    }  # fmt: skip
    assert found([1, 2], [1, 3])["gap"] == 0.5
    ended = found([1], [1, 2])
    assert ended["got"] is None and ended["gap"] is None


def test_last_logits_are_the_models_own() -> None:
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        expected = model(ids).logits[0, -1]
    torch.testing.assert_close(texts.last_logits(model, ids), expected)


# ---------------------------------------------------------------- statistics and results


def test_the_trace_of_the_steps() -> None:
    found = DecodeStats()
    found.count_step(4, [1, 3], [0, 1])
    found.count_step(1, [], [])
    found.count_step(4, [], [])
    assert found.trace == [(4, [1, 3]), (1, []), (4, [])] and found.accepted_histogram == [2, 0, 1]
    assert (found.steps, found.open_steps, found.zero_accept_steps, found.step_tokens) == (3, 2, 1, 5)


def test_results_are_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "r"
    first = Results(file)
    first.begin({"a": (1, 2)}, {"b": 1})
    first.add("k", value=1)
    file.write_bytes(file.read_bytes() + b'{"key": "l", "val')
    second = Results(file)
    assert second.identity == {"a": [1, 2]} and second == {"k": {"key": "k", "value": 1}}
    second.begin({"a": (1, 2)}, {"b": 2})
    second.add("m", value=2)
    assert [line.split(b":")[0] for line in file.read_bytes().splitlines()] == [b'{"identity"', b'{"key"', b'{"key"']
    with pytest.raises(ValueError, match=r"a must be \[1, 2\] to go on with r of the folder, got \[1\]"):
        Results(file).begin({"a": [1]}, {})
