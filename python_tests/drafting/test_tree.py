"""Draft trees, drawn by hand, and every way to get one wrong."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cerberus_ext.drafting.proposers import HeadsDrafts
from cerberus_ext.drafting.static_policy import StaticPolicy, default_tree
from cerberus_ext.drafting.tree import ALONE, filled_size

#        0
#      / | \        ranks  0 1 3
#     1  2  3
#    / \    |             0 2   0
#   4   5   6
#           |                   1
#           7
DRAWN = StaticPolicy(parents=(-1, 0, 0, 0, 1, 1, 3, 6), ranks=(0, 0, 1, 3, 0, 2, 0, 1))
PATHS = [(0,), (1,), (3,), (0, 0), (0, 2), (3, 0), (3, 0, 1)]


def test_numbers() -> None:
    assert DRAWN.tree.depths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert (DRAWN.size, DRAWN.depth, DRAWN.useful_drafts, DRAWN.sizes) == (8, 3, 4, (1, 8))
    assert DRAWN.paths() == PATHS


def test_from_paths() -> None:
    assert StaticPolicy.from_paths(PATHS) == DRAWN
    # Best first, as given; beginnings come in front of a path where they are not there yet.
    given = [(0, 2), (3, 0, 1), (0,), (0, 0), (1,)]
    assert StaticPolicy.from_paths(given).paths() == [(0,), (0, 2), (3,), (3, 0), (3, 0, 1), (0, 0), (1,)]
    assert StaticPolicy.from_paths([]) == StaticPolicy.root()


def test_root() -> None:
    root = StaticPolicy.root()
    assert (root.size, root.depth, root.useful_drafts, root.sizes, root.paths()) == (1, 0, 0, (1,), [])


def test_chain_and_widths() -> None:
    assert StaticPolicy.chain(3).parents == (-1, 0, 1, 2)
    assert StaticPolicy.chain(0) == StaticPolicy.root()
    assert StaticPolicy.from_widths([2, 3]).paths() == [(0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_cut() -> None:
    assert DRAWN.cut(3) is DRAWN.tree and DRAWN.cut(9) is DRAWN.tree
    assert DRAWN.cut(2).parents.tolist() == [-1, 0, 0, 0, 1, 1, 3] and DRAWN.cut(2) is DRAWN.cut(2)
    assert DRAWN.cut(2).ranks.tolist() == [0, 0, 1, 3, 0, 2, 0]
    assert DRAWN.cut(0) is ALONE


def test_first_nodes() -> None:
    small = DRAWN.tree.first(5)
    assert small.parents.tolist() == [-1, 0, 0, 0, 1] and small.ranks.tolist() == [0, 0, 1, 3, 0]
    assert DRAWN.tree.first(8) is DRAWN.tree and DRAWN.tree.first(9) is DRAWN.tree


@pytest.mark.parametrize(("nodes", "filled"), [(1, 1), (2, 4), (4, 4), (5, 8), (8, 8), (9, 9)])
def test_filled_size(nodes: int, filled: int) -> None:
    assert filled_size(nodes, (1, 4, 8)) == filled


def test_weighed() -> None:
    """The product of the heads' probabilities along every path; what is no draft has none."""
    table = np.array([[0.5, 0.25, 0, 0.125], [0.5, 0, 0.25, 0], [0, 1.0, 0, 0]])

    class Heads:
        def drafts(self) -> HeadsDrafts:
            with np.errstate(divide="ignore"):
                return HeadsDrafts(np.zeros((3, 4), np.int64), np.log(table).astype(np.float32))

    weighed = DRAWN.grow(Heads(), 9, True)
    assert weighed.probabilities.tolist() == pytest.approx([1, 0.5, 0.25, 0.125, 0.25, 0.125, 0.0625, 0.0625])
    assert weighed.expected_tokens[-1] == pytest.approx(1 + 1.375)
    assert DRAWN.grow(Heads(), 1, True).probabilities.tolist() == pytest.approx([1, 0.5, 0.25, 0.125])
    assert DRAWN.grow(Heads(), 2, False) is DRAWN.cut(2), "nobody asked for the probabilities"


def test_tensors(device: str) -> None:
    tensors = DRAWN.tree.on(torch.device(device))
    assert tensors.parents.tolist() == list(DRAWN.parents)
    assert tensors.depths.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert tensors.ancestors.tolist() == [[1], [3], [5], [9], [19], [35], [73], [201]]
    assert all(tensor.dtype == torch.int64 and tensor.device.type == device for tensor in tensors)


def test_tensors_of_the_root() -> None:
    assert [tensor.tolist() for tensor in ALONE.on(torch.device("cpu"))] == [[-1], [[1]], [0]]


def test_more_than_one_word_of_ancestors() -> None:
    words = StaticPolicy.chain(64).tree.on(torch.device("cpu")).ancestors
    assert words.shape == (65, 2)
    assert words[63].tolist() == [-1, 0] and words[64].tolist() == [-1, 1]


def test_from_accuracies() -> None:
    # Worth of the paths: (0) .6, (0,0) .3, (1) .2, (0,1) .12, (1,0) .1
    table = [[0.6, 0.2], [0.5, 0.2]]
    assert StaticPolicy.from_accuracies(table, 1) == StaticPolicy.root()
    assert set(StaticPolicy.from_accuracies(table, 5).paths()) == {(0,), (0, 0), (1,), (0, 1)}
    assert StaticPolicy.from_accuracies(table, 100).size == 7, "there are no more"


def heads(**config: object) -> SimpleNamespace:
    return SimpleNamespace(config=SimpleNamespace(**config))


def test_default_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for amx, size in ((True, 16), (False, 4)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert default_tree(heads(num_heads=3), cpu).size == size
    assert default_tree(heads(num_heads=3), cuda).size == 32 and default_tree(heads(num_heads=3), cuda).depth <= 3
    assert default_tree(heads(num_heads=1), cuda, 5).paths() == [(0,), (1,), (2,), (3,)]
    assert default_tree(heads(num_heads=2, accuracy=[[0.9, 0.1], [0.9, 0.1]]), cuda).size == 7, "there are no more"
    measured = heads(num_heads=2, paths=[[0], [0, 0], [1]], accuracy=[[0.5], [0.5]])
    assert default_tree(measured, cpu, 3).paths() == [(0,), (0, 0)], "the best paths come first"


WRONG = [
    (lambda: StaticPolicy((-1, 0), (0,)), ValueError, r"ranks must have one entry per node \(2\), got 1"),
    (lambda: StaticPolicy((), ()), ValueError, r"parents must begin with -1, the root's, got \(\)"),
    (lambda: StaticPolicy((0,), (0,)), ValueError, r"parents must begin with -1, the root's, got \(0,\)"),
    (lambda: StaticPolicy((-1,), (2,)), ValueError, "ranks must begin with 0, the root's, got 2"),
    (lambda: StaticPolicy((-1, 1), (0, 0)), ValueError, r"parents\[1\] must be in 0\.\.0, got 1"),
    (lambda: StaticPolicy((-1, 0, -1), (0, 0, 0)), ValueError, r"parents\[2\] must be in 0\.\.1, got -1"),
    (lambda: StaticPolicy((-1, 0), (0, -3)), ValueError, r"ranks\[1\] must be >= 0, got -3"),
    (lambda: StaticPolicy((-1, 0, 0), (0, 4, 4)), ValueError, "nodes 1 and 2 are both draft 4 after node 0"),
    (lambda: StaticPolicy((-1, 0.0), (0, 0)), TypeError, "parents must be integers, got 0.0"),
    (lambda: StaticPolicy("abc", (0, 0)), TypeError, "parents must be a sequence of integers, got 'abc'"),
    (lambda: StaticPolicy((-1, 0), (0, True)), TypeError, "ranks must be integers, got True"),
    (lambda: StaticPolicy.from_paths([(0,), ()]), ValueError, r"paths\[1\] must have at least one rank, got none"),
    (lambda: StaticPolicy.from_paths([(0, -1)]), ValueError, r"paths\[0\] must be ranks >= 0, got \(0, -1\)"),
    (lambda: StaticPolicy.from_paths(3), TypeError, r"from_paths: paths must be a sequence of paths, got 3"),
    (lambda: StaticPolicy.from_paths("01"), TypeError, r"from_paths: paths must be a sequence of paths, got '01'"),
    (lambda: StaticPolicy.from_widths(3), TypeError, r"from_widths: widths must be a sequence of integers, got 3"),
    (lambda: StaticPolicy.from_paths([0]), TypeError, r"paths\[0\] must be a sequence of integers, got 0"),
    (lambda: StaticPolicy.from_widths([2, 0]), ValueError, r"widths\[1\] must be >= 1, got 0"),
    (lambda: StaticPolicy.chain(-1), ValueError, "chain: depth must be >= 0, got -1"),
    (lambda: StaticPolicy.chain(1.5), TypeError, "chain: depth must be an integer, got 1.5"),
    (
        lambda: StaticPolicy.from_accuracies([0.5], 2),
        ValueError,
        r"accuracy must be a \(heads, drafts\) table, got shape",
    ),
    (
        lambda: StaticPolicy.from_accuracies([[1.5]], 2),
        ValueError,
        "accuracy must be probabilities in 0..1, got others",
    ),
    (lambda: StaticPolicy.from_accuracies([[float("nan")]], 2), ValueError, "accuracy must be probabilities in 0..1"),
    (lambda: StaticPolicy.from_accuracies([[0.5]], 0), ValueError, "size must be >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong(make, error, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_tree_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        DRAWN.parents = (-1,)  # type: ignore[misc]
