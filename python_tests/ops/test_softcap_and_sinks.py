"""tree_attention with soft caps and sinks: by hand, against the reference, and the bits of tree and chain."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import DTYPES, SMALL_TREE, assert_close, assert_same_bits, attention_inputs, normal, random_parents
from op_texts import commit, make_text, step

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(arguments: dict) -> None:
    got, expected = ops.tree_attention(**arguments), reference.tree_attention(**arguments)
    assert_close("tree_attention", got, expected, got.dtype, cuda=got.is_cuda)


def inputs(parents: list[int], lengths: list[int], *, scale: float = 2.0, **sizes) -> dict:
    """scale: so large that a cap of 3 flattens most scores."""
    a = attention_inputs(len(lengths), parents, lengths, **sizes)
    q = a["q"]
    return a | {
        "scale": scale,
        "softcap": 3.0,
        "sinks": normal(q.shape[2], seed=9, dtype=q.dtype, device=str(q.device)),
    }


def test_by_hand(device):
    """One committed slot and the root, scores 1 and 2, a cap of 2, a sink of 0.5."""
    keys = torch.tensor([[1.0], [2.0]], device=device)[None, None]
    values = torch.tensor([[10.0], [30.0]], device=device)[None, None]
    length, ancestors = torch.tensor([1], device=device), torch.tensor([[1]], device=device)
    q = torch.ones(1, 1, 1, 1, device=device)
    sinks = torch.tensor([0.5], device=device)

    def mean(first: float, second: float, sink: float) -> float:
        weights = [math.exp(first), math.exp(second), sink]
        return (10 * weights[0] + 30 * weights[1]) / sum(weights)

    def got(*more) -> float:
        return ops.tree_attention(q, keys, values, length, ancestors, 1.0, 0, *more).item()

    capped = 2 * math.tanh(0.5), 2 * math.tanh(1.0)
    assert got() == pytest.approx(mean(1.0, 2.0, 0.0), rel=1e-6)
    assert got(2.0) == pytest.approx(mean(*capped, 0.0), rel=1e-6)
    assert got(0.0, sinks) == pytest.approx(mean(1.0, 2.0, math.exp(0.5)), rel=1e-6)
    assert got(2.0, sinks) == pytest.approx(mean(*capped, math.exp(0.5)), rel=1e-6)
    assert reference.tree_attention(q, keys, values, length, ancestors, 1.0, 0, 2.0, sinks).item() == pytest.approx(
        mean(*capped, math.exp(0.5)), rel=1e-6
    )


@dtypes
@pytest.mark.parametrize("window", [0, 1, 33, 64])
@pytest.mark.parametrize("heads", [(4, 2, 16), (9, 3, 33), (33, 1, 64), (2, 2, 129)], ids=str)
def test_sizes(heads, window, dtype, device):
    sizes = dict(zip(("query_heads", "kv_heads", "head_size"), heads, strict=True))
    a = inputs(random_parents(33, seed=1), [0, 64, 129], dtype=dtype, device=device, **sizes) | {"window": window}
    for without in ({}, {"softcap": 0.0}, {"sinks": None}):
        check(a | without)


@dtypes
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 50.0, 1e6, 1e30])
def test_caps_of_every_size(softcap, dtype, device):
    """A cap far above the scores changes nothing: tanh of what is small keeps its digits."""
    a = inputs(SMALL_TREE, [100], dtype=dtype, device=device, scale=0.25) | {"softcap": softcap}
    check(a)
    if softcap >= 1e6:
        got, without = ops.tree_attention(**a), ops.tree_attention(**a | {"softcap": 0.0})
        assert_close("tree_attention", got, without, dtype, cuda=got.is_cuda)


@dtypes
def test_scores_beyond_every_number(dtype, device):
    """Scores of +-infinity are +-softcap, and a NaN stays where it is seen."""
    a = inputs(SMALL_TREE, [100], dtype=dtype, device=device)
    a["q"] = a["q"].abs()
    a["keys"][:, :, 7] = math.inf
    a["keys"][:, :, 8] = -math.inf
    check(a)
    a["keys"][0, 0, 102, 3] = math.nan  # node 2, of the first two query heads
    assert torch.equal(ops.tree_attention(**a).isnan().all(-1)[0, :, 0].cpu(), torch.arange(5) == 2)


@dtypes
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sinks_of_every_size(softcap, dtype, device):
    """-inf is no sink, to the bit; a large one takes all; inf and NaN are not a number for their own head alone."""
    a = inputs(SMALL_TREE, [100], dtype=dtype, device=device, query_heads=6) | {"softcap": softcap}
    a["sinks"] = torch.tensor([-math.inf, 300.0, -300.0, 5.0, math.inf, math.nan], dtype=dtype, device=device)
    got, without = ops.tree_attention(**a), ops.tree_attention(**a | {"sinks": None})
    assert_same_bits(got[:, :, 0].cpu(), without[:, :, 0].cpu())
    assert not got[:, :, 1].any() and without[:, :, 1].any()
    assert_same_bits(got[:, :, 2].cpu(), without[:, :, 2].cpu())
    assert got[:, :, 4:].isnan().all()
    four = a | {"q": a["q"][:, :, :4].contiguous(), "sinks": a["sinks"][:4].contiguous()}
    check(four | {"keys": a["keys"][:, :1].contiguous(), "values": a["values"][:, :1].contiguous()})


@dtypes
@pytest.mark.parametrize("sink", [-math.inf, 0.5])
def test_a_node_that_sees_nothing(sink, dtype, device):
    """Each sees its own slot alone, and the cache ends before it: 0, not 0 / 0."""
    a = inputs(SMALL_TREE, [40], dtype=dtype, device=device, spare=0)
    for name in ("keys", "values"):
        a[name] = a[name][:, :, :40].contiguous()
    a |= {"window": 1, "sinks": torch.full_like(a["sinks"], sink)}
    assert not ops.tree_attention(**a).any()
    assert not reference.tree_attention(**a).any()


# ---------------------------------------------------------------- a node's bits do not depend on the tree (CPU)


@dtypes
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("sizes", [(9, 3, 64), (2, 1, 33)], ids=str)
def test_tree_gives_the_bits_of_one_token_at_a_time(sizes, window, dtype):
    """A chain inside of trees of up to 64 nodes, in different places and company, against one token after the other."""
    heads = dict(zip(("query_heads", "kv_heads", "head_size"), sizes, strict=True))
    more = {"softcap": 2.0, "sinks": normal(sizes[0], seed=9, dtype=dtype)}
    text = make_text(heads, 600, dtype)
    for position in range(600):
        commit(text, position)
    whole_text = text["cache"].clone()
    for length in (0, 1, 60, 64, 127, 253, 520):
        wanted = [step(text, length + place, [length + place], [-1], window, **more)[0] for place in range(5)]
        for nodes in (5, 6, 17, 33, 64):
            # Every (nodes - 1) // 4th node is on the chain, the others hang from whatever comes before them.
            path = [place * ((nodes - 1) // 4) for place in range(5)]
            parents = random_parents(nodes, seed=nodes)
            positions = [node % 7 for node in range(nodes)]
            for place, node in enumerate(path):
                parents[node] = path[place - 1] if place else -1
                positions[node] = length + place
            in_tree = step(text, length, positions, parents, window, **more)
            for place, node in enumerate(path):
                assert_same_bits(in_tree[node], wanted[place])
            text["cache"].copy_(whole_text)


def test_rows_and_threads_do_not_matter():
    a = inputs(random_parents(40, seed=3), [0, 300, 700, 64], query_heads=6, kv_heads=2, head_size=33)
    whole = ops.tree_attention(**a)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert_same_bits(ops.tree_attention(**a), whole)
            for row in range(4):
                alone = {name: a[name][row, None].contiguous() for name in ("q", "keys", "values", "length")}
                assert_same_bits(ops.tree_attention(**a | alone)[0], whole[row])
    finally:
        torch.set_num_threads(before)
