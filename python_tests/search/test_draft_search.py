"""`_host.best_drafts` against all nodes there are, enumerated as its definition says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from draft_nodes import Draft, Node, Path, best_of, children, every_node, nodes_of
from hypothesis import example, given
from hypothesis import strategies as st

from cerberus_ext import _host

VOCAB = 6

Table = list[list[Draft]]  # of every place, best first


def every_node_of(table: Table, paths: list[Path], max_depth: int) -> list[Node]:
    def children_of(before: tuple[int, ...]) -> list[Draft]:
        return children(table[len(before)] if len(before) < len(table) else [], paths, before)

    return every_node(children_of, max_depth)


def search(table: Table, paths: list[Path], size: int, max_depth: int = 9, vocabulary: int = VOCAB) -> list[np.ndarray]:
    shape = (len(table), len(table[0]) if table else 0)
    tokens, probabilities, proposers = (
        np.array([[draft[i] for draft in row] for row in table], dtype).reshape(shape)
        for i, dtype in enumerate((np.int64, np.float64, np.int64))
    )
    given = [(np.array(t, np.int64), np.array(c, np.float64), proposer) for t, c, proposer in paths]
    return list(_host.best_drafts(tokens, probabilities, proposers, given, vocabulary, size, max_depth))


TOKENS = st.integers(0, VOCAB - 1)
PROBABILITIES = st.one_of(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), st.floats(0.0, 1.0))


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Repetitions inside a row included; rows may promise more than 1 in all."""
    drafts = draw(st.integers(0, 3))
    row = st.lists(st.tuples(TOKENS, PROBABILITIES, st.integers(0, 2)), min_size=drafts, max_size=drafts)
    rows = draw(st.lists(row, max_size=3))
    return [sorted(one, key=lambda draft: -draft[1]) for one in rows]


@st.composite
def path_lists(draw: st.DrawFn) -> list[Path]:
    """Paths that share beginnings, too."""
    paths: list[Path] = []
    for proposer in draw(st.lists(st.integers(1, 9), max_size=3)):
        tokens = draw(st.lists(TOKENS, max_size=4))
        if paths and draw(st.booleans()):
            tokens = (paths[-1][0][: draw(st.integers(0, 3))] + tokens)[:4]
        paths.append((tokens, [draw(PROBABILITIES) for _ in tokens], proposer))
    return paths


@given(table=tables(), paths=path_lists(), size=st.integers(1, 60), max_depth=st.integers(0, 4))
@example(table=[[(1, 0.5, 0), (1, 0.5, 1), (2, 0.5, 0)]], paths=[([1, 1], [0.5, 1.0], 2)], size=60, max_depth=4)
@example(table=[[(0, 1.0, 0)]] * 3, paths=[([0], [1.0], 1), ([0] * 4, [0.0, 1.0, 1.0, 1.0], 2)], size=9, max_depth=4)
def test_the_likeliest_nodes_of_all(table: Table, paths: list[Path], size: int, max_depth: int) -> None:
    every = every_node_of(table, paths, max_depth)
    found = search(table, paths, size, max_depth)
    assert [part.dtype for part in found] == [np.int64, np.int64, np.int64, np.float64]
    nodes = nodes_of(found)
    assert len(nodes) == min(size, len(every))
    known = {node.tokens: node for node in every}
    assert len({node.tokens for node in nodes}) == len(nodes)
    for node in nodes:
        expected = known[node.tokens]
        assert node.probability == pytest.approx(expected.probability, rel=1e-12) and node.proposer == expected.proposer
    assert [node.probability for node in nodes] == pytest.approx(best_of(every, size), rel=1e-12), "best first"


@given(table=tables(), paths=path_lists(), size=st.integers(1, 40))
def test_the_first_nodes_are_the_smaller_tree(table: Table, paths: list[Path], size: int) -> None:
    """And with equal inputs, many of which tie, trees are equal."""
    whole, again, small = search(table, paths, 60), search(table, paths, 60), search(table, paths, size)
    for one, other, part in zip(whole, again, small, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[:size], part)


def test_drawn_by_hand() -> None:
    """Heads (proposer 0) say 1 or 2, then 3 or 4; another proposer (7) says 2 3 5."""
    heads = [[(1, 0.6, 0), (2, 0.2, 0)], [(3, 0.5, 0), (4, 0.2, 0)]]
    nodes = nodes_of(search(heads, [([2, 3, 5], [0.6, 0.4, 0.5], 7)], 20))
    # Token 2 is now at 0.6, which leaves 0.4 of 0.8 to the others: 1 has 0.3. After 2, the heads know 3 better.
    assert [(node.tokens, node.proposer) for node in nodes] == [
        ((), 0), ((2,), 7), ((1,), 0), ((2, 3), 0), ((1, 3), 0), ((2, 3, 5), 7), ((2, 4), 0), ((1, 4), 0),
    ]  # fmt: skip
    probabilities = [1, 0.6, 0.3, 0.3, 0.15, 0.15, 0.12, 0.06]
    assert [node.probability for node in nodes] == pytest.approx(probabilities)


def test_ties_go_to_the_earlier_draft() -> None:
    table = [[(5, 0.25, 0), (4, 0.25, 0), (3, 0.25, 0), (2, 0.25, 0)]]
    assert [node.tokens for node in nodes_of(search(table, [], 9))] == [(), (5,), (4,), (3,), (2,)]
    paths = [([5], [0.25], 1), ([4], [0.25], 2), ([5], [0.25], 3)]
    assert [(n.tokens, n.proposer) for n in nodes_of(search([], paths, 9))] == [((), 0), ((5,), 1), ((4,), 2)]


def test_of_two_paths_the_likelier_counts() -> None:
    """Token by token: the first knows better how to begin, the second how to go on."""
    paths = [([1, 2, 3], [0.9, 0.1, 0.5], 1), ([1, 2, 4], [0.2, 0.8, 0.25], 2)]
    nodes = nodes_of(search([], paths, 9))
    assert [(n.tokens, n.proposer) for n in nodes[1:]] == [((1,), 1), ((1, 2), 2), ((1, 2, 3), 1), ((1, 2, 4), 2)]
    assert [n.probability for n in nodes] == pytest.approx([1, 0.9, 0.72, 0.36, 0.18])


def test_a_certain_path_leaves_nothing_to_others() -> None:
    table = [[(1, 0.9, 0), (2, 0.1, 0)], [(1, 0.9, 0), (2, 0.1, 0)]]
    nodes = nodes_of(search(table, [([3], [1.0], 4)], 60))
    assert [n.tokens for n in nodes] == [(), (3,), (3, 1), (3, 2)], "after the path, the places go on"


@pytest.mark.parametrize(
    ("table", "paths", "max_depth"),
    [
        ([], [], 5),
        ([[], []], [], 5),
        ([[(1, 0.5, 0)]], [([2], [0.5], 1)], 0),
        ([[(1, 0.0, 0)]], [([2, 3], [0.0, 1.0], 1)], 5),  # nobody believes in them
        ([], [([], [], 1)], 5),
    ],
)
def test_the_root_alone(table: Table, paths: list[Path], max_depth: int) -> None:
    assert nodes_of(search(table, paths, 20, max_depth)) == [Node((), 1.0, 0)]


def test_paths_are_deeper_than_the_table() -> None:
    nodes = nodes_of(search([[(1, 0.5, 0)]], [([1] * 200, [0.999] * 200, 1)], 150, max_depth=120))
    assert len(nodes) == 121 and len(nodes[-1].tokens) == 120 and nodes[-1].probability == pytest.approx(0.999**120)


def test_any_layout_and_number_type() -> None:
    tokens, probabilities, proposers = (
        np.array([[1, 2], [3, 4]]),
        np.array([[0.5, 0.25], [0.75, 0.125]]),
        np.zeros((2, 2), int),
    )
    expected = _host.best_drafts(tokens, probabilities, proposers, [], VOCAB, 7, 9)
    for wide in (np.asfortranarray(tokens), tokens.astype(np.uint8), tokens.tolist()):
        again = _host.best_drafts(wide, probabilities.astype(np.float32), proposers.astype(np.int32), [], VOCAB, 7, 9)
        for one, other in zip(expected, again, strict=True):
            np.testing.assert_array_equal(one, other)


OK: dict[str, Any] = {
    "tokens": [[1, 2]], "probabilities": [[0.5, 0.25]], "proposers": [[0, 0]], "paths": [([3], [0.5], 1)],
    "vocabulary": VOCAB, "size": 4, "max_depth": 3,
}  # fmt: skip
WRONG = [
    ({"size": 0}, "size must be >= 1, got 0"),
    ({"size": -(2**63)}, "size must be >= 1, got -9223372036854775808"),
    ({"max_depth": -1}, "max_depth must be >= 0, got -1"),
    ({"tokens": [[1, 6]]}, "tokens must be in 0 .. 5, got 6"),
    ({"tokens": [[-1, 2]]}, "tokens must be in 0 .. 5, got -1"),
    ({"probabilities": [[0.5, -0.25]]}, "probabilities must be in 0 .. 1, got -0.25"),
    ({"probabilities": [[1.5, 0.25]]}, "probabilities must be in 0 .. 1, got 1.5"),
    ({"probabilities": [[0.5, math.nan]]}, "probabilities must be in 0 .. 1, got -?nan"),
    ({"probabilities": [[0.25, 0.5]]}, "the drafts of a depth must be best first"),
    ({"probabilities": [[0.5]]}, "tokens and probabilities must have one shape"),
    ({"proposers": [[0]]}, "proposers must have the shape of tokens"),
    ({"tokens": [1, 2]}, "tokens must be a 2-D array of integers, got 1-D"),
    ({"tokens": [[1.0, 2.0]]}, "tokens must be a 2-D array of integers, got 2-D of dtype float64"),
    ({"probabilities": [[True, False]]}, "probabilities must be a 2-D array of real numbers, got 2-D of dtype bool"),
    ({"proposers": [[0.5, 0.5]]}, "proposers must be a 2-D array of integers, got 2-D of dtype float64"),
    ({"paths": [([3], [math.nan], 1)]}, "probabilities must be in 0 .. 1, got -?nan"),
    ({"paths": [([3], [0.5], 1), ([9], [0.5], 1)]}, "tokens must be in 0 .. 5, got 9"),
    ({"paths": [([3], [0.5, 0.5], 1)]}, "tokens and probabilities must have one shape"),
    ({"paths": [([[3]], [[0.5]], 1)]}, "tokens must be a 1-D array of integers, got 2-D"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong(changes: dict[str, Any], message: str) -> None:
    assert len(_host.best_drafts(**OK)[0]) == 4
    with pytest.raises(ValueError, match=f"^best_drafts: {message}"):
        _host.best_drafts(**{**OK, **changes})


@pytest.mark.parametrize("changes", [{"paths": [([3], [0.5])]}, {"paths": 3}, {"size": 1.5}, {"vocabulary": None}])
def test_numbers_and_lists_of_another_type(changes: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        _host.best_drafts(**{**OK, **changes})
