"""Products of parameters, of which most tests of a kind run a share: every two values meet, not every three."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations, product
from typing import Any

import pytest


def covering(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indexes, row[i] < sizes[i], in which every two values of two columns meet; few, and always the same."""
    columns = list(combinations(range(len(sizes)), 2))
    missing = {(a, i, b, j) for a, b in columns for i in range(sizes[a]) for j in range(sizes[b])}
    rows = []
    while missing:
        a, i, b, j = min(missing)
        row: dict[int, int] = {a: i, b: j}

        for column in range(len(sizes)):
            if column not in row:
                row[column] = max(range(sizes[column]), key=partial(_gain, row, column, missing=missing))
        missing -= {(a, row[a], b, row[b]) for a, b in columns}
        rows.append(tuple(row[column] for column in range(len(sizes))))
    return rows


def _gain(row: dict[int, int], column: int, value: int, missing: set[tuple[int, int, int, int]]) -> int:
    """How many missing pairs a value of one more column adds to a row."""
    pairs = ((other, row[other], column, value) for other in row)
    return sum((pair if pair[0] < column else pair[2:] + pair[:2]) in missing for pair in pairs)


def pairwise(*, indirect: Sequence[str] = (), **parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """`parametrize` with all combinations; those beyond a share in which every two values meet are slow tests."""
    values = [list(choices) for choices in parameters.values()]
    assert len(values) > 2, "of two, every pair is all there is"
    chosen = set(covering([len(choices) for choices in values]))
    rows = product(*(range(len(choices)) for choices in values))
    cases = [
        pytest.param(*(choices[i] for choices, i in zip(values, row, strict=True)),
                     marks=() if row in chosen else pytest.mark.slow)
        for row in rows
    ]  # fmt: skip
    return pytest.mark.parametrize(tuple(parameters), cases, indirect=list(indirect))
