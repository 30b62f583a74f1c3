"""write_cache and commit_cache: the CUDA kernels under emulation against the reference, bit for bit."""

import pytest
import torch
from op_cases import DTYPES, assert_same_bits, integers, normal, random_parents, tree

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(0, 5, 2, 8), (1, 0, 2, 8), (1, 1, 1, 1), (3, 5, 3, 7), (2, 33, 1, 8), (1, 9, 2, 64), (2, 3, 1, 129)]


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(("rows", "nodes", "kv_heads", "head_size"), SHAPES)
def test_write_cache(rows, nodes, kv_heads, head_size, offset, dtype, simt):
    """Rows whose slots lie outside of the cache, in part or all of them, are left out."""
    capacity = 40
    lengths = torch.tensor([3, 38, -2])[:rows]
    new = [normal(rows, nodes, kv_heads, head_size, seed=seed, dtype=dtype) for seed in (1, 2)]
    caches = [normal(rows, kv_heads, capacity, head_size, seed=seed, dtype=dtype) for seed in (3, 4)]
    expected = [cache.clone() for cache in caches]
    simt("write_cache", *caches, *new, lengths, offset=offset)
    reference.write_cache(*expected, *new, lengths)
    for got, wanted in zip(caches, expected, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("planes", [0, 2])
@pytest.mark.parametrize(("rows", "nodes", "kv_heads", "head_size"), [s for s in SHAPES if s[1] > 0])
def test_commit_cache(rows, nodes, kv_heads, head_size, planes, offset, dtype, simt):
    parents, ancestors, depth = tree(random_parents(nodes, seed=3))
    draft, target = (integers(0, 2, rows, nodes, seed=seed) for seed in (1, 2))
    path, accepted = reference.verify_tree(draft, target, parents, ancestors, depth)
    length = integers(0, 9, rows, seed=5)
    cache = normal(planes, rows, kv_heads, 9 + nodes, head_size, dtype=dtype)
    expected, expected_length = cache.clone(), length.clone()
    simt("commit_cache", cache, length, path, accepted, offset=offset)
    reference.commit_cache(expected, expected_length, path, accepted)
    assert_same_bits(cache, expected)
    assert torch.equal(length, expected_length)


@pytest.mark.parametrize("schedule", range(4))
@pytest.mark.parametrize(("rows", "planes", "head_size"), [(300, 1, 2), (3, 9, 129)])
def test_commit_cache_advances_every_length_once(rows, planes, head_size, schedule, simt):
    """Rows of one block and of five, which read the length and count themselves in any order."""
    simt.seed(schedule)
    path = torch.tensor([[0, 2, 3]] * rows, dtype=torch.int32)
    accepted = integers(0, 3, rows).int()
    cache, length = normal(planes, rows, 1, 9, head_size), integers(0, 6, rows, seed=1)
    expected, expected_length = cache.clone(), length.clone()
    simt("commit_cache", cache, length, path, accepted)
    reference.commit_cache(expected, expected_length, path, accepted)
    assert_same_bits(cache, expected)
    assert torch.equal(length, expected_length)
