"""The cache by itself: what it holds, hands out, keeps and forgets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cerberus_ext.target.cache import TreeCache

LAYERS, HEADS, SIZE = 2, 3, 4


def states(tokens: int, device: str, heads: int = HEADS, size: int = SIZE) -> Tensor:
    """(1, heads, tokens, size) like a model's: a view of (1, tokens, heads, size)."""
    return torch.randn(1, tokens, heads, size, device=device).transpose(1, 2)


def fill(cache: TreeCache, tokens: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """One forward: new keys and values for every layer."""
    new = [(states(tokens, device), states(tokens, device)) for _ in range(LAYERS)]
    for layer, (keys, values) in enumerate(new):
        cache.update(keys, values, layer)
    return new


def make(device: str, capacity: int = 12) -> TreeCache:
    return TreeCache(LAYERS, capacity, 1, torch.device(device))


def test_prompt_then_tree(device: str) -> None:
    """A prompt of 5, then 4 nodes of which 0, 2 and 3 are kept."""
    cache = make(device)
    assert (cache.get_seq_length(), cache.get_mask_sizes(5, 0), cache.layers[0].get_max_length()) == (0, (5, 0), 12)
    prompt = fill(cache, 5, device)
    assert cache.get_seq_length() == 0, "nothing is kept before extend"
    cache.extend(5)
    assert cache.get_seq_length() == 5 and cache.get_mask_sizes(4, 1) == (9, 0)

    cache.whole = True
    nodes = fill(cache, 4, device)
    path = torch.tensor([[0, 2, 3, -1]], dtype=torch.int32, device=device)
    cache.commit(path, torch.tensor([2], dtype=torch.int32, device=device))
    cache.committed += 3
    assert cache.length.tolist() == [8] and cache.tensor is not None
    for layer in range(LAYERS):
        for which in range(2):
            kept = torch.cat([prompt[layer][which], nodes[layer][which][:, :, [0, 2, 3]]], 2)
            assert cache.tensor[2 * layer + which, :, :, :8].equal(kept)


def test_nodes_are_forgotten_for_free(device: str) -> None:
    cache = make(device)
    fill(cache, 2, device)
    cache.extend(2)
    fill(cache, 6, device)
    again = fill(cache, 3, device)
    keys, _ = cache.update(*again[0], 0)
    assert keys.shape == (1, HEADS, 5, SIZE) and keys[:, :, 2:].equal(again[0][0])


def test_reset_keeps_the_memory_for_another_prompt(device: str) -> None:
    cache = make(device)
    fill(cache, 5, device)
    cache.extend(5)
    cache.whole = True
    before, length = cache.tensor, cache.length
    cache.reset()
    assert (cache.length.tolist(), cache.committed, cache.whole, cache.get_seq_length()) == ([0], 0, False, 0)
    new = fill(cache, 2, device)
    keys, _ = cache.update(*new[0], 0)
    assert keys.equal(new[0][0]) and cache.tensor is before and cache.length is length


@pytest.mark.parametrize("whole", [False, True])
def test_what_attention_gets(whole: bool, device: str) -> None:
    cache = make(device)
    fill(cache, 2, device)
    cache.extend(2)
    cache.whole = whole
    keys, values = cache.update(states(3, device), states(3, device), 1)
    assert keys.shape == values.shape == (1, HEADS, 12 if whole else 5, SIZE)
    assert cache.tensor is not None and keys.data_ptr() == cache.tensor[2].data_ptr()


def test_too_many_tokens() -> None:
    cache = make("cpu", capacity=4)
    with pytest.raises(ValueError, match="TreeCache: 5 tokens do not fit into a capacity of 4"):
        fill(cache, 5, "cpu")


@pytest.mark.parametrize(
    ("keys", "values", "which"),
    [
        (states(2, "cpu", heads=2), states(2, "cpu", heads=2), "keys of layer 1"),
        (states(2, "cpu", size=8), states(2, "cpu"), "keys of layer 1"),
        (states(2, "cpu"), states(2, "cpu", size=8), "values of layer 1"),
        (states(2, "cpu").double(), states(2, "cpu").double(), "keys of layer 1"),
    ],
)
def test_layers_that_differ_are_refused(keys: Tensor, values: Tensor, which: str) -> None:
    cache = make("cpu")
    cache.update(states(2, "cpu"), states(2, "cpu"), 0)
    with pytest.raises(ValueError, match=f"TreeCache: {which} must have .* like the keys of layer 0"):
        cache.update(keys, values, 1)


def test_tells_transformers_what_it_is() -> None:
    cache = make("cpu")
    assert len(cache) == LAYERS and cache.is_sliding == [False] * LAYERS and not cache.is_initialized
    fill(cache, 1, "cpu")
    assert cache.is_initialized
