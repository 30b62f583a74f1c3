"""What tests marked `pairwise` leave to the slow ones: combinations of three values, never one of two."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from combinations import covering

NUMBERS = [(letter, digit, number) for letter, digit, number in product("abcde", "1234", range(3))]


def pairs(rows: list[tuple]) -> set:
    return {pair for row in rows for pair in combinations(enumerate(row), 2)}


@pytest.mark.parametrize(
    ("rows", "most"),
    [
        (NUMBERS, 22),  # of 60; 5 * 4 is the least
        ([row for row in NUMBERS if row[0] != "a" or row[1] == "1"], 20),  # some combinations are not there
        (list(product("ab", "cd")), 4),
        ([("a",)], 0),
        ([], 0),
    ],
)
def test_every_two_values_that_meet_still_do(rows: list[tuple], most: int) -> None:
    chosen = covering(rows)
    assert pairs([rows[number] for number in chosen]) == pairs(rows) and len(chosen) <= most
    assert chosen == covering(rows)


@pytest.mark.pairwise
@pytest.mark.parametrize("third", ["x", "y", "z"])
@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("options", [{"a": 1}, {"a": 2}])
def test_of_three_parameters(
    options: dict[str, int], first: int, second: int, third: str, request: pytest.FixtureRequest
) -> None:
    """9 of the 18 are not slow, and in these every two values meet. Two names of one `parametrize` are one value."""
    cases = [
        item for item in request.session.items if item.nodeid.partition("[")[0] == request.node.nodeid.partition("[")[0]
    ]
    if not request.node.get_closest_marker("slow") and len(cases) > 1:
        values = [case.callspec.params for case in cases if not case.get_closest_marker("slow")]
        rows = [(value["options"]["a"], (value["first"], value["second"]), value["third"]) for value in values]
        assert len(rows) == 9 and pairs(rows) == pairs(list(product((1, 2), ((1, 1), (1, 2), (2, 1)), "xyz")))
