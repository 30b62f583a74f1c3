"""verify_tree: trees drawn by hand, and random ones against a brute force that shares no code with the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import SIZES, integers, random_parents, tree

from cerberus_ext import ops
from cerberus_ext.ops import reference

#         0
#       / | \
#      1  2  3
#     / \ |  |
#    4  5 6  7
#    |    |
#    8    9
TREE = [-1, 0, 0, 0, 1, 1, 2, 3, 4, 6]


def verify(draft, target, parents, device):
    """Lists in, lists out: (path, accepted) of every row."""
    parents, ancestors, depth = tree(parents, device)
    path, accepted = ops.verify_tree(
        torch.tensor(draft, device=device), torch.tensor(target, device=device), parents, ancestors, depth
    )
    assert path.dtype == accepted.dtype == torch.int32
    return path.tolist(), accepted.tolist()


@pytest.mark.parametrize(
    ("why", "draft", "target", "path"),
    [
        ("no draft is right", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [99] * 10, [0, -1, -1, -1]),
        ("one", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [2] + [99] * 9, [0, 2, -1, -1]),
        ("to a leaf", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [2, 0, 6, 0, 0, 0, 9, 0, 0, 0], [0, 2, 6, 9]),
        ("a leaf that is not the deepest", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 0, 0, 7] + [99] * 6, [0, 3, 7, -1]),
        ("the parent is wrong", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 6, 0, 8, 0, 9, 0, 0, 0], [0, 3, -1, -1]),
        ("siblings alike: the lowest", [0, 5, 5, 5, 1, 1, 1, 1, 1, 1], [5] + [99] * 9, [0, 1, -1, -1]),
        ("siblings alike: the longer", [0, 5, 5, 5, 1, 1, 1, 1, 1, 1], [5, 9, 1] + [9] * 7, [0, 2, 6, -1]),
        ("equally long: the lowest", [0] * 10, [0] * 10, [0, 1, 4, 8]),
        ("the root's own token is not read", [-7] + [0] * 9, [0] * 10, [0, 1, 4, 8]),
        (
            "large and negative tokens",
            [0, 2**62, -1, 0, 2**62 + 1, -5] + [0] * 4,
            [2**62, 2**62 + 1] + [9] * 8,
            [0, 1, 4, -1],
        ),
    ],
)
def test_by_hand(why, draft, target, path, device):
    accepted = sum(node >= 0 for node in path) - 1
    assert verify([draft], [target], TREE, device) == ([path], [accepted]), why


def test_rows_are_apart(device):
    draft = [[0, 1, 2, 3], [0, 3, 2, 1], [0, 1, 1, 1]]
    target = [[1, 2, 3, 0], [3, 1, 1, 1], [2, 1, 1, 1]]
    # 0 -> 1 -> 2, 1 -> 3
    assert verify(draft, target, [-1, 0, 1, 1], device) == ([[0, 1, 2], [0, 1, 3], [0, -1, -1]], [2, 2, 0])


def test_root_alone(device):
    assert verify([[5], [6]], [[5], [1]], [-1], device) == ([[0], [0]], [0, 0])


def test_depth_may_be_more_than_the_tree_has(device):
    """Up to N - 1, which no tree of N nodes exceeds."""
    parents, ancestors, _ = tree([-1, 0, 0, 0, 0], device)
    ones = torch.ones(1, 5, dtype=torch.int64, device=device)
    path, accepted = ops.verify_tree(ones, ones, parents, ancestors, 4)
    assert path.tolist() == [[0, 1, -1, -1, -1]] and accepted.tolist() == [1]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_nodes_below_depth_are_not_accepted(depth, device):
    parents, ancestors, _ = tree([-1, 0, 1, 2], device)
    ones = torch.ones(3, 4, dtype=torch.int64, device=device)
    path, accepted = ops.verify_tree(ones, ones, parents, ancestors, depth)
    assert path.tolist() == [list(range(depth + 1))] * 3 and accepted.tolist() == [depth] * 3


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("nodes", [1, 33, 63, 64, 65, 128, 129, 200])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_random(rows, nodes, tokens, device):
    """Few different tokens, so that long paths and ties occur. Masks of one, two, three and four words."""
    parents, ancestors, depth = tree(random_parents(nodes, seed=nodes), device)
    draft = integers(0, tokens, rows, nodes, seed=1, device=device)
    target = integers(0, tokens, rows, nodes, seed=2, device=device)
    path, accepted = ops.verify_tree(draft, target, parents, ancestors, depth)
    assert path.shape == (rows, depth + 1) and accepted.shape == (rows,)
    expected_path, expected_accepted = reference.verify_tree(draft, target, parents, ancestors, depth)
    assert torch.equal(path, expected_path)
    assert torch.equal(accepted, expected_accepted)


def brute_force(draft: list[int], target: list[int], parents: list[int]) -> list[int]:
    """The longest path on which every draft is its parent's target, the lowest of equal ends: all paths are walked."""
    best = [0]
    for end in range(len(parents)):
        path = [end]
        while path[0] != 0:
            path.insert(0, parents[path[0]])
        right = all(draft[child] == target[parent] for parent, child in zip(path, path[1:], strict=False))
        if right and len(path) > len(best):
            best = path
    return best


@st.composite
def steps(draw):
    nodes = draw(st.integers(1, 90))
    parents = [-1] + [draw(st.integers(max(0, i - draw(st.sampled_from([1, 3, 90]))), i - 1)) for i in range(1, nodes)]
    token = st.integers(0, draw(st.integers(0, 3)))
    tokens = st.lists(token, min_size=nodes, max_size=nodes)
    return parents, draw(tokens), draw(tokens)


@given(steps())
@settings(derandomize=True)
def test_against_brute_force(step):
    parents, draft, target = step
    expected = brute_force(draft, target, parents)
    parents_tensor, ancestors, depth = tree(parents)
    arguments = (torch.tensor([draft]), torch.tensor([target]), parents_tensor, ancestors, depth)
    for verify_tree in (ops.verify_tree, reference.verify_tree):
        path, accepted = verify_tree(*arguments)
        assert path.tolist() == [expected + [-1] * (depth + 1 - len(expected))]
        assert accepted.tolist() == [len(expected) - 1]
