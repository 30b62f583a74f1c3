"""tree_attention against the reference, the reference against a walk along the tree, and the bits of tree and chain."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import (
    DTYPES,
    SIZES,
    SMALL_TREE,
    assert_close,
    assert_same_bits,
    attention_inputs,
    chain,
    normal,
    random_parents,
    tree,
)
from op_texts import commit, make_text, step

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(arguments: dict) -> None:
    q = arguments["q"]
    got, expected = ops.tree_attention(**arguments), reference.tree_attention(**arguments)
    assert_close("tree_attention", got, expected, q.dtype, cuda=q.is_cuda)


@pytest.mark.parametrize("window", [0, 1, 2, 5, 100])
def test_reference_is_a_walk_along_the_tree(window):
    """For each node: its ancestors by following parents, its positions by counting, a softmax over a list of slots."""
    lengths, parents = [0, 1, 7], random_parents(12, seed=3)
    a = attention_inputs(3, parents, lengths) | {"window": window}
    got = reference.tree_attention(**a)
    for row, length in enumerate(lengths):
        for node in range(len(parents)):
            path = [node]
            while path[0] != 0:
                path.insert(0, parents[path[0]])
            slots = list(range(length)) + [length + i for i in path]  # in order of position
            if window:
                slots = slots[-window:]
            for head in range(4):
                scores = [
                    float(a["q"][row, node, head].double() @ a["keys"][row, head // 2, s].double()) / 4 for s in slots
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                expected = sum(w * a["values"][row, head // 2, s].double() for w, s in zip(weights, slots, strict=True))
                torch.testing.assert_close(got[row, node, head], (expected / sum(weights)).float())


def test_by_hand(device):
    """One head of size 2, all scores equal: a node's output is the mean of the values it sees.

    Committed: 1, 2. Tree 0 -> 1 -> 3, 0 -> 2; values of the nodes: 10, 20, 40, 80. A slot of NaN follows.
    """
    values = torch.tensor([1.0, 2.0, 10.0, 20.0, 40.0, 80.0, math.nan])[:, None].expand(7, 2)
    values = values.reshape(1, 1, 7, 2).contiguous().to(device)
    keys = torch.zeros_like(values)
    keys[0, 0, 6] = math.nan
    _, ancestors, _ = tree([-1, 0, 0, 1], device)
    q = normal(1, 4, 1, 2, device=device)
    length = torch.tensor([2], device=device)
    seen = {
        0: [13 / 3, 33 / 4, 53 / 4, 113 / 5],  # 1 2 10 | 1 2 10 20 | 1 2 10 40 | 1 2 10 20 80
        3: [13 / 3, 32 / 3, 52 / 3, 110 / 3],  # 1 2 10 | 2 10 20 | 2 10 40 | 10 20 80
        1: [10.0, 20.0, 40.0, 80.0],
    }
    for window, expected in seen.items():
        got = ops.tree_attention(q, keys, values, length, ancestors, 1.0, window)
        wanted = torch.tensor(expected, device=device)[None, :, None, None].expand(1, 4, 1, 2)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


@dtypes
@pytest.mark.parametrize("nodes", [*SIZES, 63, 64, 65])
@pytest.mark.parametrize("lengths", [[0], [1, 33], [129, 0, 64]], ids=str)
def test_sizes(nodes, lengths, dtype, device):
    check(attention_inputs(len(lengths), random_parents(nodes, seed=nodes), lengths, dtype=dtype, device=device))


@dtypes
@pytest.mark.parametrize("rows", SIZES)
def test_rows(rows, dtype, device):
    lengths = [(37 * row) % 131 for row in range(rows)]
    check(attention_inputs(rows, SMALL_TREE, lengths, dtype=dtype, device=device))


@dtypes
@pytest.mark.parametrize("head_size", [1, 8, 33, 64, 80, 128, 129, 256])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (9, 3), (33, 1), (8, 8)])
def test_heads(query_heads, kv_heads, head_size, dtype, device):
    heads = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
    check(attention_inputs(1, SMALL_TREE, [70], dtype=dtype, device=device, **heads))


@dtypes
@pytest.mark.parametrize("window", [-1, 0, 1, 2, 33, 64, 65, 129, 1000])
def test_window(window, dtype, device):
    a = attention_inputs(3, random_parents(33, seed=1), [0, 64, 129], dtype=dtype, device=device)
    check(a | {"window": window})


@dtypes
def test_full_cache(dtype, device):
    """length + N == S: the last node sits in the last slot."""
    check(attention_inputs(2, random_parents(33, seed=2), [95, 95], spare=0, dtype=dtype, device=device))


@dtypes
def test_no_slots_at_all(dtype, device):
    """No nodes, no capacity: an empty result."""
    check(attention_inputs(2, [], [0, 0], spare=0, dtype=dtype, device=device))


@dtypes
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_scale(scale, dtype, device):
    """0 is the mean; at 30 the scores reach hundreds, where exp without the maximum taken off would overflow."""
    check(attention_inputs(1, SMALL_TREE, [100], dtype=dtype, device=device) | {"scale": scale})


def test_scores_far_below_zero(device):
    """All scores at -10^4: exp of each alone is 0, their softmax is not."""
    a = attention_inputs(1, SMALL_TREE, [100], device=device)
    a["q"] = torch.ones_like(a["q"])
    # Whole numbers: products and sums of this size are exact in float32, whatever their order.
    a["keys"] = torch.where(a["keys"].isnan(), a["keys"], a["keys"].round() - 2500.0)
    check(a)


@dtypes
@pytest.mark.parametrize("name", ["keys", "values"])
def test_nan_stays_where_it_is_seen(name, dtype, device):
    """A NaN in node 2 and one in slot 80 of head 1: who sees them gets NaN, the others what they would get anyway."""
    a = attention_inputs(1, SMALL_TREE, [100], dtype=dtype, device=device)
    before = ops.tree_attention(**a)
    a[name][0, 0, 102, 3] = math.nan  # of key/value head 0, so of query heads 0 and 1
    a[name][0, 1, 80, 3] = math.nan
    got = ops.tree_attention(**a)
    touched = torch.zeros(5, 4, dtype=torch.bool)
    touched[2, :2] = True
    touched[:, 2:] = True
    assert torch.equal(got.isnan().any(-1)[0].cpu(), touched)
    assert_same_bits(got[0].cpu()[~touched], before[0].cpu()[~touched])


# ---------------------------------------------------------------- a node's bits do not depend on the tree (CPU)

LENGTHS = (0, 1, 63, 64, 65, 127, 200, 254, 257, 600)  # around the borders of blocks of 64 and pieces of 256 positions
#        0 - 1 - 3 - 6 - 8 - 10      the chain that is looked at
#         \   \   \   \
#          2   4   7   9             branches in between, so that its nodes are not in neighbouring slots
#              |
#              5
BRANCHED = [-1, 0, 0, 1, 1, 4, 3, 3, 6, 6, 8]
TOKENS = (0, 1, 3, 6, 8, 10)


@dtypes
@pytest.mark.parametrize("window", [0, 3, 64, 100, 300])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (2, 1, 33)], ids=str)
def test_tree_gives_the_bits_of_one_token_at_a_time(sizes, window, dtype):
    """Design rule 6: one text token by token, as a path of a tree with branches, and as a plain chain."""
    heads = dict(zip(("query_heads", "kv_heads", "head_size"), sizes, strict=True))
    depth = len(TOKENS)
    text = make_text(heads, max(LENGTHS) + depth, dtype)
    for position in range(max(LENGTHS) + depth):
        commit(text, position)
    whole_text = text["cache"].clone()
    for length in LENGTHS:
        wanted = [step(text, length + place, [length + place], [-1], window)[0] for place in range(depth)]
        # The branches carry other tokens: those of the text from its beginning.
        positions = [node % 5 for node in range(len(BRANCHED))]
        for place, node in enumerate(TOKENS):
            positions[node] = length + place
        in_tree = step(text, length, positions, BRANCHED, window)
        in_chain = step(text, length, list(range(length, length + depth)), chain(depth), window)
        for place, node in enumerate(TOKENS):
            assert_same_bits(in_tree[node], wanted[place])
            assert_same_bits(in_chain[place], wanted[place])
        text["cache"].copy_(whole_text)


@dtypes
def test_long_chain_across_blocks(dtype):
    """200 nodes in one tree give the bits of 200 steps: the nodes themselves fill several blocks."""
    text = make_text({"query_heads": 2, "kv_heads": 1, "head_size": 16}, 230, dtype)
    wanted = torch.cat([step(text, position, [position], [-1], 0) for position in range(230)])
    assert_same_bits(step(text, 30, list(range(30, 230)), chain(200), 0), wanted[30:])


@dtypes
@pytest.mark.parametrize("group", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("length", [130, 765])
def test_any_number_of_queries_side_by_side(length, group, dtype):
    """Sums that cancel, of 1 to 63 queries a key/value head: a node's bits are those that it has alone.

    Elements of keys and values take turns at being large, with both signs, so that any other order of a sum shows.
    """
    nodes, size = 9, 80
    whole = attention_inputs(1, chain(nodes), [length], query_heads=group, kv_heads=1, head_size=size, dtype=dtype)
    whole["q"][..., ::3] *= 8
    whole["keys"][:, :, ::2, ::5] *= 8
    whole["values"][:, :, ::2] *= 100
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            wanted = ops.tree_attention(**whole)
            for count in range(1, nodes):
                first = whole | {"q": whole["q"][:, :count].contiguous(), "ancestors": tree(chain(count))[1]}
                assert_same_bits(ops.tree_attention(**first), wanted[:, :count])
            for node in range(nodes):
                alone = {"q": whole["q"][:, node, None].contiguous(), "ancestors": torch.tensor([[1]])}
                alone["length"] = torch.tensor([length + node])
                assert_same_bits(ops.tree_attention(**whole | alone)[:, 0], wanted[:, node])
    finally:
        torch.set_num_threads(before)
