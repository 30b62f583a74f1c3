"""tree_attention: the CUDA kernels under emulation against the reference.

The slots that nobody may look at hold NaN, see attention_inputs.
"""

import math

import pytest
import torch
from op_cases import (
    DTYPES,
    SMALL_TREE,
    assert_close,
    assert_same_bits,
    attention_inputs,
    chain,
    normal,
    random_parents,
    tree,
)

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(simt, arguments, offset=0):
    got = simt("tree_attention", *arguments.values(), offset=offset)
    assert_close("tree_attention", got, reference.tree_attention(**arguments), arguments["q"].dtype, cuda=True)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("head_size", [1, 8, 20, 33, 64, 80, 96, 128, 129, 256])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(1, 1), (6, 2)])
def test_head_sizes(query_heads, kv_heads, head_size, dtype, simt):
    heads = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
    check(simt, attention_inputs(1, SMALL_TREE, [37], dtype=dtype, **heads))


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("nodes", [0, 1, 2, 15, 16, 17, 33, 65, 129])
@pytest.mark.parametrize("lengths", [[0], [1, 33], [70, 0, 64]], ids=str)
def test_sizes(nodes, lengths, dtype, simt):
    parents = random_parents(nodes, seed=nodes)
    check(simt, attention_inputs(len(lengths), parents, lengths, dtype=dtype, query_heads=2, kv_heads=1))


@dtypes
@pytest.mark.parametrize("length", [0, 31, 32, 63, 64, 65, 127, 128, 200, 300])
def test_lengths(length, dtype, simt):
    """Around the borders of blocks of keys; with more than 256 slots the keys are split."""
    check(simt, attention_inputs(1, SMALL_TREE, [length], dtype=dtype, head_size=64, query_heads=2, kv_heads=1))


@dtypes
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(9, 3), (16, 1), (17, 1), (3, 3)])
def test_groups(query_heads, kv_heads, dtype, simt):
    check(simt, attention_inputs(1, SMALL_TREE, [20], dtype=dtype, query_heads=query_heads, kv_heads=kv_heads))


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("window", [-1, 0, 1, 2, 5, 33, 64, 1000])
@pytest.mark.parametrize("head_size", [16, 33])
def test_window(head_size, window, dtype, simt):
    arguments = attention_inputs(2, random_parents(20, seed=1), [0, 70], dtype=dtype, head_size=head_size)
    check(simt, arguments | {"window": window})


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("head_size", [16, 64])
def test_full_cache_and_unaligned(head_size, offset, dtype, simt):
    """length + N == S: the last node sits in the last slot, and behind it lies the guard."""
    arguments = attention_inputs(2, random_parents(9, seed=2), [55, 23], spare=0, dtype=dtype, head_size=head_size)
    check(simt, arguments, offset=offset)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("head_size", [32, 33])
@pytest.mark.parametrize("schedule", range(4))
def test_schedules(schedule, head_size, dtype, simt):
    simt.seed(schedule)
    check(simt, attention_inputs(1, chain(6), [75], dtype=dtype, head_size=head_size))


@dtypes
def test_nothing(dtype, simt):
    """No nodes and no slots: an empty result."""
    check(simt, attention_inputs(2, [], [0, 0], spare=0, dtype=dtype))


@dtypes
@pytest.mark.parametrize("scale", [0.0, 30.0])
def test_scale(scale, dtype, simt):
    """0 is the mean; at 30 the scores reach hundreds, where exp without the maximum taken off would overflow."""
    check(simt, attention_inputs(1, SMALL_TREE, [50], dtype=dtype) | {"scale": scale})


def test_scores_far_below_zero(simt):
    """All scores at -10^4: exp of each alone is 0, their softmax is not."""
    arguments = attention_inputs(1, SMALL_TREE, [50])
    arguments["q"] = torch.ones_like(arguments["q"])
    # Whole numbers: products and sums of this size are exact in float32, whatever their order.
    arguments["keys"] = torch.where(arguments["keys"].isnan(), arguments["keys"], arguments["keys"].round() - 2500.0)
    check(simt, arguments)


# ---------------------------------------------------------------- pieces, tiles, and what must not leak between nodes


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "nodes", "head_size"),
    [
        (1, 1, 1, 160),
        (6, 1, 5, 200),
        (32, 8, 1, 8),
        (9, 3, 7, 96),
        (4, 2, 70, 64),
        (6, 1, 33, 80),
        (6, 1, 9, 128),
        (2, 1, 130, 128),
    ],
)
def test_shapes_of_blocks(query_heads, kv_heads, nodes, head_size, window, dtype, simt):
    """From one query row to several tiles of them, in a cache much larger than what is in it: many pieces."""
    heads = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
    check(simt, attention_inputs(1, random_parents(nodes), [271], dtype=dtype, spare=400, **heads) | {"window": window})


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("lengths", [[0, 300], [63, 64]], ids=str)
@pytest.mark.parametrize("window", [1, 5, 40])
def test_window_and_words_of_the_mask(window, lengths, dtype, simt):
    """Paths longer than the window, and masks of three words that begin anywhere in a tile."""
    parents = chain(100) + [10, 70, 99, *range(102, 129)]
    check(simt, attention_inputs(2, parents, lengths, dtype=dtype, query_heads=1, kv_heads=1) | {"window": window})


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("length", [30, 39, 40, 41, 1000])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("head_size", [16, 9])
def test_cache_that_is_too_small(head_size, window, length, dtype, simt):
    """40 slots: the nodes that have none are not seen, and a node that sees nothing gets 0."""
    arguments = attention_inputs(1, random_parents(12, seed=5), [40], dtype=dtype, head_size=head_size, spare=0)
    for name in ("keys", "values"):
        arguments[name] = arguments[name][:, :, :40].contiguous()
    arguments |= {"length": torch.tensor([length]), "window": window}
    got = simt("tree_attention", *arguments.values())
    expected = reference.tree_attention(**arguments).nan_to_num(0.0)  # the mean of nothing
    assert_close("tree_attention", got, expected, dtype, cuda=True)


@dtypes
def test_length_below_zero(dtype, simt):
    """Taken for 0, and nothing is touched outside of the cache."""
    arguments = attention_inputs(2, SMALL_TREE, [0, 0], dtype=dtype)
    expected = reference.tree_attention(**arguments)
    got = simt("tree_attention", *(arguments | {"length": torch.tensor([-1, -(2**63)])}).values())
    assert_close("tree_attention", got, expected, dtype, cuda=True)


@dtypes
@pytest.mark.parametrize("names", [["q"], ["keys"], ["values"]], ids=str)
def test_one_unaligned_tensor(names, dtype, simt):
    arguments = attention_inputs(1, SMALL_TREE, [150], dtype=dtype, head_size=64)
    for name in names:
        memory = torch.empty(arguments[name].numel() + 1, dtype=dtype)
        memory[1:] = arguments[name].flatten()
        arguments[name] = memory[1:].view_as(arguments[name])
    got = torch.ops.cerberus_simt.tree_attention(*arguments.values())  # simt would align them
    assert_close("tree_attention", got, reference.tree_attention(**arguments), dtype, cuda=True)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("scale", [-0.3, 2.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_maxima_that_grow_and_shrink(sign, scale, dtype, simt):
    """Scores that rise or fall by hundreds along the slots, steps below and above the slack of the maximum."""
    arguments = attention_inputs(1, SMALL_TREE, [300], dtype=dtype, query_heads=2, kv_heads=1)
    ramp = sign * torch.linspace(-3.0, 3.0, 308).pow(3)[:, None]
    arguments["q"] = arguments["q"].abs()
    arguments["keys"] = torch.where(arguments["keys"].isnan(), arguments["keys"], ramp.to(dtype))
    check(simt, arguments | {"scale": scale})


@pytest.mark.pairwise
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["keys", "values"])
@pytest.mark.parametrize("query_heads", [4, 20, 64])  # of two: 10, 50 and 160 rows, for each shape of blocks
@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [
        (torch.float32, 9),
        (torch.float32, 64),
        (torch.float16, 9),
        *((dtype, size) for dtype in (torch.float16, torch.bfloat16) for size in (16, 64, 96, 128, 160)),
    ],
    ids=str,
)
def test_what_is_not_finite_stays_where_it_is_seen(dtype, head_size, query_heads, name, value, simt):
    """In node 2, in a committed slot that every node sees, and in one that has left the window of the deeper nodes.

    Who sees them is not finite there; the others are, bit for bit, what they would be anyway.
    """
    heads = {"query_heads": query_heads, "kv_heads": 2, "head_size": head_size}
    arguments = attention_inputs(1, SMALL_TREE, [100], dtype=dtype, **heads)
    before = simt("tree_attention", *arguments.values())
    changed = arguments | {name: arguments[name].clone()}
    changed[name][0, 0, 102, 3] = value  # of the first half of the query heads
    changed[name][0, 1, 80, 3] = value
    got = simt("tree_attention", *changed.values())
    touched = torch.zeros(5, query_heads, dtype=torch.bool)
    touched[2, : query_heads // 2] = True
    touched[:, query_heads // 2 :] = True
    if name == "values":
        assert torch.equal(~got[0].isfinite().all(-1), touched)
        assert not got[0][touched][:, 3].isfinite().any()
    elif math.isnan(value):
        assert torch.equal(got[0].isnan().all(-1), touched)
    assert_same_bits(got[0][~touched], before[0][~touched])

    arguments["window"] = 10
    before = simt("tree_attention", *arguments.values())
    arguments[name][:, :, 92, 3] = value  # of position 92: seen by the root and its children, at 100 and 101
    got = simt("tree_attention", *arguments.values())
    assert_same_bits(got[0, 3:5], before[0, 3:5])
    if name == "values":
        assert not got[0, [0, 1, 2], :, 3].isfinite().any()


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("head_size", [64, 33])
@pytest.mark.parametrize("nodes", [4, 50])
def test_bits_do_not_depend_on_the_other_nodes(nodes, head_size, dtype, simt):
    """Three nodes in a row, and other nodes: other queries, another tree, keys and values of nothing but NaN."""
    heads = {"query_heads": 3, "kv_heads": 1, "head_size": head_size}
    arguments = attention_inputs(1, [-1, 0, 1] + [1] * (nodes - 3), [250], dtype=dtype, **heads)
    wanted = simt("tree_attention", *arguments.values())[0, :3]
    other = attention_inputs(1, [-1, 0, 1] + [0, *range(3, nodes - 1)], [250], dtype=dtype, **heads)
    other["q"][:, 3:] = normal(1, nodes - 3, 3, head_size, seed=9, dtype=dtype)
    for name in ("keys", "values"):
        other[name][:, :, 253 : 250 + nodes] = math.nan
    assert_same_bits(simt("tree_attention", *other.values())[0, :3], wanted)


def begun(arguments, first, count, capacity):
    """The call for `count` nodes of a chain from node `first` on, those before it being committed, in a cache of
    `capacity` slots of which those that nobody sees hold NaN."""
    length = int(arguments["length"])
    used = length + first + count
    changed = dict(arguments)
    for name in ("keys", "values"):
        rows, heads, _, size = arguments[name].shape
        changed[name] = torch.full((rows, heads, capacity, size), math.nan, dtype=arguments[name].dtype)
        changed[name][:, :, :used] = arguments[name][:, :, :used]
    changed["q"] = arguments["q"][:, first : first + count].contiguous()
    changed["length"] = arguments["length"] + first
    changed["ancestors"] = tree(chain(count))[1]
    return changed


EVERY = range(1, 64)
SOME = (1, 3, 4, 5, 16, 17, 32, 33, 63)  # the first and last numbers of nodes of each shape of blocks among them


@pytest.mark.parametrize(
    ("dtype", "head_size", "window", "counts"),
    [
        (torch.bfloat16, 16, 0, EVERY),
        (torch.bfloat16, 16, 50, SOME),
        (torch.bfloat16, 96, 0, SOME),
        (torch.float16, 128, 50, SOME),
        (torch.float16, 160, 0, SOME),
        (torch.float32, 8, 0, EVERY),
        (torch.float32, 33, 50, SOME),
        (torch.bfloat16, 33, 0, SOME),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_number_of_nodes(dtype, head_size, window, counts, simt):
    """A chain of 64 nodes across the border of two pieces, and its beginnings of 1 to 63: 1 to 256 query rows."""
    query_heads = 4 if dtype != torch.float32 and head_size % 8 == 0 else 1  # one shape of blocks without tensor cores
    heads = {"query_heads": query_heads, "kv_heads": 1, "head_size": head_size, "dtype": dtype}
    arguments = attention_inputs(1, chain(64), [220], **heads) | {"window": window}
    wanted = simt("tree_attention", *arguments.values())
    for nodes in counts:
        got = simt("tree_attention", *begun(arguments, 0, nodes, 220 + 64 + nodes % 3 * 100).values())
        assert_same_bits(got, wanted[:, :nodes])


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("dtype", "head_size"),
    [(torch.float32, 16), (torch.float16, 33), *((torch.bfloat16, size) for size in (16, 96, 128, 160))],
    ids=str,
)
@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize("border", [32, 64, 256, 512, 4096, 4608, 5120])
def test_bits_do_not_depend_on_what_is_committed(border, window, dtype, head_size, simt):
    """Around the borders of tiles and pieces, also where pieces double: a chain of five nodes gives what one node after
    the other does, in a cache that ends with them and in a longer one."""
    heads = {"query_heads": 4, "kv_heads": 1, "head_size": head_size, "dtype": dtype}
    arguments = attention_inputs(1, chain(5), [border - 3], **heads) | {"window": window}
    wanted = simt("tree_attention", *arguments.values())
    for node in range(5):
        for capacity in (border + 2, border + 700):
            got = simt("tree_attention", *begun(arguments, node, 1, capacity).values())
            assert_same_bits(got, wanted[:, node : node + 1])


# ---------------------------------------------------------------- soft caps and sinks


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize(("softcap", "window"), [(2.0, 0), (0.0, 40)])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "nodes", "head_size"),
    [(6, 2, 5, 33), (4, 2, 1, 64), (6, 1, 9, 96), (4, 2, 70, 64), (6, 1, 33, 128), (6, 1, 3, 160), (9, 3, 7, 256)],
)
@pytest.mark.parametrize("length", [160, 271], ids=["whole", "split"])
def test_softcap_and_sinks(length, query_heads, kv_heads, nodes, head_size, window, softcap, dtype, simt):
    """All kernels, unsplit and split: sinks far below the scores up to above them."""
    heads = {"query_heads": query_heads, "kv_heads": kv_heads, "head_size": head_size}
    arguments = attention_inputs(1, random_parents(nodes), [length], dtype=dtype, **heads)
    sinks = torch.linspace(-30.0, 12.0, query_heads).to(dtype)
    sinks[1] = -math.inf
    check(simt, arguments | {"scale": 0.7, "window": window, "softcap": softcap, "sinks": sinks})


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("softcap", [1e-3, 50.0, 1e6, 1e30])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
@pytest.mark.parametrize("head_size", [16, 33])
def test_caps_of_every_size(head_size, scale, softcap, dtype, simt):
    arguments = attention_inputs(1, SMALL_TREE, [80], dtype=dtype, head_size=head_size)
    check(simt, arguments | {"scale": scale, "softcap": softcap})


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("head_size", [16, 33])
@pytest.mark.parametrize("length", [150, 300], ids=["whole", "split"])
def test_sinks_that_are_not_finite_or_alone(length, head_size, dtype, simt):
    """inf and NaN reach no other head; a node that sees nothing gives 0 whether its head has a sink or none."""
    arguments = attention_inputs(1, SMALL_TREE, [length], dtype=dtype, head_size=head_size)
    without = simt("tree_attention", *arguments.values())
    arguments["sinks"] = torch.tensor([math.inf, -math.inf, math.nan, 300.0], dtype=dtype)
    got = simt("tree_attention", *arguments.values())
    assert got[:, :, [0, 2]].isnan().all() and not got[:, :, 3].any()
    assert_same_bits(got[:, :, 1], without[:, :, 1])

    for name in ("keys", "values"):
        arguments[name] = arguments[name][:, :, :length].contiguous()
    arguments |= {"window": 1, "sinks": torch.tensor([0.0, -math.inf, 3.0, -3.0], dtype=dtype)}
    assert not simt("tree_attention", *arguments.values()).any()
