"""Tests marked `pairwise`: of all combinations of their parameters, most runs need only a share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest


def covering(rows: Sequence[Sequence[Hashable]]) -> set[int]:
    """Which rows to take, so that every two values of two columns that meet in some row meet in one of these. Few, and
    always the same ones."""
    pairs = [set(combinations(enumerate(row), 2)) for row in rows]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(rows)), key=lambda row: len(pairs[row] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return chosen


def row_of(item: Any) -> list[Hashable]:
    """What a test was called with: a value for each `parametrize`, and for each fixture with parameters."""
    names = [mark.args[0] for mark in item.iter_markers("parametrize")]
    columns = [[part.strip() for part in name.split(",")] if isinstance(name, str) else list(name) for name in names]
    values = dict(item.callspec.params)
    row = [tuple(id(values.pop(name)) for name in column) for column in columns]  # some cannot be hashed
    return row + [id(values[name]) for name in sorted(values)]


def mark_slow(items: Sequence[pytest.Item]) -> None:
    """Marks what is left over of the tests marked `pairwise`."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("pairwise"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        chosen = covering([row_of(case) for case in cases])
        for number, case in enumerate(cases):
            if number not in chosen:
                case.add_marker("slow")
