"""write_cache and commit_cache: every element against the reference, and nothing written outside of the cache."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, SIZES, assert_same_bits, integers, normal, random_parents, tree

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

CANARY = 77.0
MARGIN = 4096


def guarded(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A contiguous copy of values with canaries before and behind it -> (copy, the whole of the memory)."""
    memory = torch.full((values.numel() + 2 * MARGIN,), CANARY, dtype=values.dtype, device=values.device)
    inside = memory[MARGIN : MARGIN + values.numel()].view(values.shape)
    inside.copy_(values)
    return inside, memory


def assert_canaries(memory: torch.Tensor) -> None:
    assert (memory[:MARGIN] == CANARY).all() and (memory[-MARGIN:] == CANARY).all(), "written outside of the cache"


@dtypes
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(
    ("nodes", "kv_heads", "head_size"), [(0, 2, 8), (1, 3, 64), (33, 1, 1), (129, 2, 33), (5, 3, 129)]
)
def test_write_cache(rows, nodes, kv_heads, head_size, dtype, device):
    if rows * nodes > 2000:
        head_size = min(head_size, 4)  # the reference copies slot by slot
    capacity = nodes + 7
    given = {"dtype": dtype, "device": device}
    keys, keys_memory = guarded(normal(rows, kv_heads, capacity, head_size, seed=1, **given))
    values, values_memory = guarded(normal(rows, kv_heads, capacity, head_size, seed=2, **given))
    new_keys = normal(rows, nodes, kv_heads, head_size, seed=3, **given)
    new_values = normal(rows, nodes, kv_heads, head_size, seed=4, **given)
    length = integers(0, 8, rows, seed=5, device=device)
    expected_keys, expected_values = keys.clone(), values.clone()
    reference.write_cache(expected_keys, expected_values, new_keys, new_values, length)
    ops.write_cache(keys, values, new_keys, new_values, length)
    assert_same_bits(keys, expected_keys)
    assert_same_bits(values, expected_values)
    assert_canaries(keys_memory)
    assert_canaries(values_memory)


@dtypes
def test_write_cache_moves_bits(dtype, device):
    """NaN payloads, -0 and denormals arrive as they are: the values are moved, never computed with."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    new = bits.view(torch.float16 if dtype is torch.float32 else dtype).reshape(1, 128, 1, 512).to(device)
    if dtype is torch.float32:
        new = bits.to(torch.int32).mul(65537).view(dtype).reshape(1, 128, 1, 512).to(device)
    keys, values = (torch.zeros(1, 1, 128, 512, dtype=dtype, device=device) for _ in range(2))
    ops.write_cache(keys, values, new, new, torch.zeros(1, dtype=torch.int64, device=device))
    assert_same_bits(keys[0, 0], new[0, :, 0])
    assert_same_bits(values[0, 0], new[0, :, 0])


@dtypes
@pytest.mark.parametrize(
    "lengths", [[5, 5], [6, 0], [7, 9], [10, 10], [11, 0], [2**31, 2**40], [2**63 - 1, 2**63 - 5], [-1, -(2**63)]]
)
def test_write_cache_never_writes_outside(lengths, dtype, device):
    """Capacity 10, 5 nodes: from length 6 on, some do not fit; these are left out, the others are written."""
    given = {"dtype": dtype, "device": device}
    keys, keys_memory = guarded(normal(2, 3, 10, 8, seed=1, **given))
    values, values_memory = guarded(normal(2, 3, 10, 8, seed=2, **given))
    new_keys, new_values = normal(2, 5, 3, 8, seed=3, **given), normal(2, 5, 3, 8, seed=4, **given)
    expected_keys, expected_values = keys.clone(), values.clone()
    length = torch.tensor(lengths, device=device)
    if min(lengths) >= 0:
        reference.write_cache(expected_keys, expected_values, new_keys, new_values, length)
    ops.write_cache(keys, values, new_keys, new_values, length)
    assert_canaries(keys_memory)
    assert_canaries(values_memory)
    if min(lengths) >= 0:
        assert_same_bits(keys, expected_keys)
        assert_same_bits(values, expected_values)


@dtypes
def test_commit_cache_by_hand(dtype, device):
    """One plane, one head, one number a slot: what sits where is readable.

    Row 0: length 2, path 0 -> 2 -> 3 accepted: slots 2, 4, 5 move to 2, 3, 4.
    Row 1: length 0, only the root: nothing moves. Row 2: length 5, path 0 -> 1: stays in place, too.
    """
    slots = torch.arange(10.0).repeat(3, 1)
    cache = slots.reshape(1, 3, 1, 10, 1).to(device, dtype)
    length = torch.tensor([2, 0, 5], device=device)
    path = torch.tensor([[0, 2, 3], [0, -1, -1], [0, 1, -1]], dtype=torch.int32, device=device)
    accepted = torch.tensor([2, 0, 1], dtype=torch.int32, device=device)
    ops.commit_cache(cache, length, path, accepted)
    assert length.tolist() == [5, 1, 7]
    got = cache.reshape(3, 10).cpu().float()
    assert got[0, :5].tolist() == [0, 1, 2, 4, 5]
    assert got[1].tolist() == list(range(10))
    assert got[2].tolist() == list(range(10))


@dtypes
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(
    ("planes", "kv_heads", "head_size", "nodes"),
    [(0, 2, 8, 5), (1, 1, 1, 1), (4, 3, 33, 33), (2, 1, 2, 129), (60, 3, 4, 9)],
)
def test_commit_cache(rows, planes, kv_heads, head_size, nodes, dtype, device):
    """Random accepted paths of a random tree, up to the last slot of the cache."""
    _, ancestors, depth = tree(random_parents(nodes, seed=nodes))
    on_path = reference.is_ancestor(ancestors, nodes)
    capacity = nodes + 6
    cache, memory = guarded(normal(planes, rows, kv_heads, capacity, head_size, seed=1, dtype=dtype, device=device))
    length = integers(0, 7, rows, seed=2, device=device)
    path = torch.full((rows, depth + 1), -1, dtype=torch.int32)
    accepted = torch.zeros(rows, dtype=torch.int32)
    for row, node in enumerate(integers(0, nodes, rows, seed=3).tolist()):
        chosen = on_path[node].nonzero().flatten().int()
        path[row, : len(chosen)] = chosen
        accepted[row] = len(chosen) - 1
    path, accepted = path.to(device), accepted.to(device)
    expected, expected_length = cache.clone(), length.clone()
    reference.commit_cache(expected, expected_length, path, accepted)
    ops.commit_cache(cache, length, path, accepted)
    assert torch.equal(length, expected_length)
    # What lies behind the committed slots is forgotten: the op may leave anything there.
    live = (torch.arange(capacity, device=device) < length[:, None])[None, :, None, :, None]
    assert_same_bits(cache.masked_fill(~live, 0), expected.masked_fill(~live, 0))
    assert_canaries(memory)


@dtypes
@pytest.mark.parametrize("lengths", [[8, 9], [10, 10], [2**62, 0]])
def test_commit_cache_never_writes_outside(lengths, dtype, device):
    """Wrong lengths are not noticed, but the memory around the cache stays what it is."""
    cache, memory = guarded(normal(2, 2, 1, 10, 4, dtype=dtype, device=device))
    path = torch.tensor([[0, 3, 4], [0, 2, 5]], dtype=torch.int32, device=device)
    accepted = torch.tensor([2, 2], dtype=torch.int32, device=device)
    ops.commit_cache(cache, torch.tensor(lengths, device=device), path, accepted)
    assert_canaries(memory)
