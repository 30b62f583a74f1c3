"""verify_tree: the CUDA kernel under emulation against the reference."""

import pytest
import torch
from op_cases import chain, integers, random_parents, tree

from cerberus_ext.ops import reference


def check(simt, parents, rows, tokens, more_depth=0):
    """Few different tokens, so that long paths and ties occur."""
    parents, ancestors, depth = tree(parents)
    draft, target = (integers(0, tokens, rows, len(parents), seed=seed) for seed in (1, 2))
    arguments = (draft, target, parents, ancestors, max(depth + more_depth, 0))
    for got, expected in zip(simt("verify_tree", *arguments), reference.verify_tree(*arguments), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("nodes", [1, 2, 31, 32, 33, 63, 64, 65, 129, 257])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_random(nodes, tokens, simt):
    check(simt, random_parents(nodes, seed=nodes), 4, tokens)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("more_depth", [-1, 0, 2])
def test_depth(rows, more_depth, simt):
    """Nodes below `depth` are left out; what the tree does not reach is -1."""
    check(simt, [*chain(70), 0, 0], rows, 1, more_depth)


@pytest.mark.parametrize("schedule", range(4))
def test_schedules(schedule, simt):
    simt.seed(schedule)
    check(simt, random_parents(100, seed=schedule), 3, 2)
