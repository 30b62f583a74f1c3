"""The tree search and the tree checks of the pybind11 module _host."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerberus_ext import _host

BAD_PARENTS = [
    ([], r"parents must name at least the root, got 0 nodes"),
    ([0], r"parents\[0\] must be -1, got 0"),
    ([-1, 1], r"parents\[1\] must be in 0 .. 0, got 1"),
    ([-1, 0, -1], r"parents\[2\] must be in 0 .. 1, got -1"),
    ([-1, 0, 5], r"parents\[2\] must be in 0 .. 1, got 5"),
    ([[-1, 0]], r"parents must be a 1-D array of integers, got 2-D of dtype int64"),
    ([-1.0, 0.0], r"parents must be a 1-D array of integers, got 1-D of dtype float64"),
    (None, r"parents must be a 1-D array of integers, got 0-D of dtype object"),
]


def accuracies(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[float]]]:
    """(K, P) tables small enough that every path can be listed: at most 3 + 9 + 27 nodes below the root."""
    shape = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return shape.flatmap(
        lambda kp: st.lists(st.lists(values, min_size=kp[1], max_size=kp[1]), min_size=kp[0], max_size=kp[0])
    )


def paths(parents: np.ndarray, ranks: np.ndarray) -> list[tuple[int, ...]]:
    """Each node as the ranks on its path; the root is ()."""
    found: list[tuple[int, ...]] = [()]
    for parent, rank in zip(parents[1:], ranks[1:], strict=True):
        found.append((*found[parent], int(rank)))
    return found


def probability(path: tuple[int, ...], accuracy: list[list[float]]) -> float:
    return math.prod((accuracy[depth][rank] for depth, rank in enumerate(path)), start=1.0)


@given(accuracy=accuracies(st.floats(0.0, 1.0)), size=st.integers(1, 45))
def test_best_tree_has_the_most_accepted_drafts_of_all_trees(accuracy: list[list[float]], size: int) -> None:
    heads, drafts = len(accuracy), len(accuracy[0])
    every = [p for depth in range(heads + 1) for p in itertools.product(range(drafts), repeat=depth)]
    best = sorted((probability(path, accuracy) for path in every), reverse=True)[:size]

    parents, ranks = _host.best_tree(np.array(accuracy), size)
    chosen = paths(parents, ranks)

    assert parents.dtype == ranks.dtype == np.int64
    assert parents[0] == -1 and ranks[0] == 0
    assert all(0 <= parent < i for i, parent in enumerate(parents) if i > 0)
    assert len(chosen) == min(size, len(every))
    assert len(set(chosen)) == len(chosen)
    # No tree is worth more than the `size` best nodes of all, whose sum this is.
    assert sum(probability(path, accuracy) for path in chosen) == pytest.approx(sum(best))


@given(accuracy=accuracies(st.sampled_from([0.0, 0.25, 0.5, 1.0])), size=st.integers(1, 45))
def test_best_tree_is_the_same_every_time_and_grows_by_appending(accuracy: list[list[float]], size: int) -> None:
    parents, ranks = _host.best_tree(np.array(accuracy), size)
    more_parents, more_ranks = _host.best_tree(np.array(accuracy), size + 1)
    np.testing.assert_array_equal(parents, more_parents[: len(parents)])
    np.testing.assert_array_equal(ranks, more_ranks[: len(ranks)])


def test_best_tree_drawn_by_hand() -> None:
    # Below the root: 0.6 and 0.3. Below 0.6: 0.6 * 0.5 = 0.3 and 0.6 * 0.4 = 0.24. Below 0.3: 0.15 and 0.12.
    # The two 0.3 tie: the child of 0.6 could be added first.
    parents, ranks = _host.best_tree(np.array([[0.6, 0.3], [0.5, 0.4]]), 7)
    assert parents.tolist() == [-1, 0, 1, 0, 1, 3, 3]
    assert ranks.tolist() == [0, 0, 0, 1, 1, 0, 1]


def test_best_tree_prefers_the_better_draft_whatever_its_rank() -> None:
    parents, ranks = _host.best_tree(np.array([[0.1, 0.7, 0.2]]), 3)
    assert parents.tolist() == [-1, 0, 0]
    assert ranks.tolist() == [0, 1, 2]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (4, 0)])
def test_best_tree_without_drafts_is_the_root(shape: tuple[int, int]) -> None:
    parents, ranks = _host.best_tree(np.zeros(shape), 5)
    assert parents.tolist() == [-1]
    assert ranks.tolist() == [0]


def test_best_tree_reads_any_layout_and_number_type() -> None:
    table = np.array([[0.75, 0.5], [0.5, 0.25], [0.25, 0.125]])
    expected = _host.best_tree(table, 8)
    for other in (np.asfortranarray(table), table.astype(np.float32), table[:, ::-1][:, ::-1], table.tolist()):
        np.testing.assert_array_equal(_host.best_tree(other, 8), expected)


@pytest.mark.parametrize(
    ("accuracy", "size", "message"),
    [
        ([[0.5]], 0, r"size must be >= 1, got 0"),
        ([[0.5]], -3, r"size must be >= 1, got -3"),
        ([[0.5, 1.5]], 4, r"accuracy\[0\]\[1\] must be in 0 .. 1, got 1.5"),
        ([[0.5], [-0.1]], 4, r"accuracy\[1\]\[0\] must be in 0 .. 1, got -0.1"),
        ([[math.nan]], 4, r"accuracy\[0\]\[0\] must be in 0 .. 1, got -?nan"),
        ([0.5], 4, r"accuracy must be a 2-D array of real numbers, got 1-D of dtype float64"),
        ([["a"]], 4, r"accuracy must be a 2-D array of real numbers, got 2-D of dtype <U1"),
        ([[1j]], 4, r"accuracy must be a 2-D array of real numbers, got 2-D of dtype complex128"),
        ([[0.5], [0.5, 0.5]], 4, r"accuracy must be a 2-D array of real numbers, got <class 'list'>"),
    ],
)
def test_best_tree_refuses(accuracy: object, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^best_tree: {message}"):
        _host.best_tree(accuracy, size)


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """Parents of a tree of up to 200 nodes, so of up to four words of ancestors."""
    nodes = draw(st.integers(1, 200))
    seed = draw(st.integers(0, 2**32 - 1))
    reach = draw(st.integers(1, nodes))  # small: long chains; large: flat trees
    random = np.random.default_rng(seed)
    return [-1, *(int(random.integers(max(0, i - reach), i)) for i in range(1, nodes))]


@given(parents=trees())
def test_ancestors_and_depths_of_any_tree(parents: list[int]) -> None:
    masks, depths = _host.ancestors(np.array(parents)), _host.depths(np.array(parents))
    assert masks.dtype == depths.dtype == np.int64
    assert masks.shape == (len(parents), math.ceil(len(parents) / 64))
    for node in range(len(parents)):
        path = [node]
        while parents[path[-1]] != -1:
            path.append(parents[path[-1]])
        words = masks[node].astype(np.uint64)
        assert {j for j in range(64 * len(words)) if int(words[j // 64]) >> (j % 64) & 1} == set(path)
        assert depths[node] == len(path) - 1


def test_ancestors_uses_the_sign_bit() -> None:
    masks = _host.ancestors(np.array([-1] + [0] * 64))
    assert masks.shape == (65, 2)
    assert masks[63].tolist() == [-(2**63) + 1, 0]
    assert masks[64].tolist() == [1, 1]


def test_parents_of_another_integer_type_or_layout() -> None:
    wide = np.array([-1, 9, 0, 9, 1, 9], dtype=np.int32)
    assert _host.depths(wide[::2]).tolist() == [0, 1, 2]
    assert _host.ancestors(wide[::2]).tolist() == [[1], [3], [7]]


@pytest.mark.parametrize(("parents", "message"), BAD_PARENTS)
@pytest.mark.parametrize("name", ["ancestors", "depths"])
def test_parents_that_are_no_tree(name: str, parents: object, message: str) -> None:
    value = np.array(parents, dtype=np.int64) if parents == [] else parents
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(_host, name)(value)
