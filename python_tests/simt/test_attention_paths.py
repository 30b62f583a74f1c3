"""tree_attention under emulation: a node of a tree has the bits that its token gets when its path is decoded token by
token, wherever in the cache the path's keys lie."""

import math

import pytest
import torch
from attention_paths import alone, cancelling_inputs, path_to
from op_cases import assert_same_bits, chain, random_parents

# With and without tensor cores, in tiles of 64 and of 32 positions.
SOME_KERNELS = [(torch.bfloat16, 16), (torch.bfloat16, 128), (torch.float16, 33), (torch.float32, 16)]
# And every head size that there is a kernel for.
MORE_KERNELS = [
    (torch.bfloat16, 64),
    (torch.bfloat16, 96),
    (torch.float16, 72),
    (torch.bfloat16, 256),
    (torch.float32, 128),
]
some_kernels = pytest.mark.parametrize(("dtype", "head_size"), SOME_KERNELS, ids=str)


def check(simt, arguments, parents, nodes):
    got = simt("tree_attention", *arguments.values())
    for node in nodes:
        wanted = simt("tree_attention", *alone(arguments, parents, node, spare=node % 2 * 300).values())
        assert_same_bits(got[:, node : node + 1], wanted)


def deepest(parents):
    return max(range(len(parents)), key=lambda node: len(path_to(parents, node)))


@pytest.mark.parametrize(("dtype", "head_size"), SOME_KERNELS + MORE_KERNELS, ids=str)
@pytest.mark.parametrize("nodes", [2, 5, 17, 40, 64])
def test_numbers_of_nodes(nodes, dtype, head_size, simt):
    """Of one to eight tiles of query rows, around the end of a tile of positions."""
    parents = random_parents(nodes, seed=nodes)
    heads = {"query_heads": 6, "kv_heads": 2, "head_size": head_size, "dtype": dtype}
    arguments = cancelling_inputs(parents, 61, **heads)
    check(simt, arguments, parents, sorted({0, 1, nodes // 2, nodes - 1, deepest(parents)}))


def test_every_node_of_every_number(simt):
    for nodes in (1, 2, 3, 7, 16, 33, 64):
        parents = random_parents(nodes, seed=nodes)
        sizes = {"query_heads": 2, "kv_heads": 1, "head_size": 16, "dtype": torch.bfloat16}
        check(simt, cancelling_inputs(parents, 50, **sizes), parents, range(nodes))


@pytest.mark.pairwise
@some_kernels
@pytest.mark.parametrize("border", [0, 16, 32, 64, 256, 512, 4096, 4608])
@pytest.mark.parametrize("before", [1, 3])
def test_borders(before, border, dtype, head_size, simt):
    """Paths that cross the borders of steps of a product, of tiles and of pieces, also where pieces double."""
    parents = [-1, 0, 0, 1, 1, 4, 3, 3, 6, 6, 8, 5]
    sizes = {"query_heads": 3, "kv_heads": 1, "head_size": head_size, "dtype": dtype}
    arguments = cancelling_inputs(parents, max(0, border - before), **sizes)
    check(simt, arguments, parents, range(0, 12, 2) if border > 300 else range(12))


@pytest.mark.pairwise
@some_kernels
@pytest.mark.parametrize("window", [1, 20, 300])
@pytest.mark.parametrize("length", [0, 63, 250])
@pytest.mark.parametrize("rules", [{}, {"sinks": True}, {"softcap": 5.0, "sinks": True}], ids=str)
def test_windows_caps_and_sinks(rules, length, window, dtype, head_size, simt):
    parents = random_parents(20, seed=window)
    arguments = cancelling_inputs(parents, length, query_heads=4, kv_heads=2, head_size=head_size, dtype=dtype)
    sinks = torch.tensor([3.0, -math.inf, 0.0, 30.0]).to(dtype)
    arguments |= {"window": window, **rules} | ({"sinks": sinks} if "sinks" in rules else {})
    check(simt, arguments, parents, [0, 3, 11, 19, deepest(parents)])


@pytest.mark.parametrize(
    ("dtype", "head_size", "nodes"),
    [(torch.bfloat16, 16, 300), (torch.bfloat16, 128, 130), (torch.float16, 256, 130), (torch.float32, 16, 130)],
    ids=str,
)
def test_more_nodes_than_there_is_room_for(nodes, head_size, dtype, simt):
    """A trunk of 70 nodes, longer than a tile, and a tree on it: keys are gathered on their way to shared memory."""
    parents = chain(70) + [69 + parent for parent in random_parents(nodes - 70, seed=3)]
    parents[70] = 40
    arguments = cancelling_inputs(parents, 45, query_heads=2, kv_heads=1, head_size=head_size, dtype=dtype)
    check(simt, arguments, parents, [0, 39, 69, 70, 71, nodes // 2, nodes - 1, deepest(parents)])


@pytest.mark.pairwise
@some_kernels
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("group", [1, 5, 16, 20])
def test_groups_of_heads_and_several_texts(group, kv_heads, dtype, head_size, simt):
    """Nodes whose rows begin in the middle of a tile of rows, or fill more than one; three texts of other lengths."""
    parents, lengths = random_parents(9, seed=group), [3, 130, 62]
    sizes = {"query_heads": group * kv_heads, "kv_heads": kv_heads, "head_size": head_size, "dtype": dtype}
    each = [cancelling_inputs(parents, length, spare=140 - length, **sizes) for length in lengths]
    together = each[0] | {name: torch.cat([one[name] for one in each]) for name in ("q", "keys", "values", "length")}
    got = simt("tree_attention", *together.values())
    for row, one in enumerate(each):
        for node in (0, 4, 8):
            wanted = simt("tree_attention", *alone(one, parents, node).values())
            assert_same_bits(got[row : row + 1, node : node + 1], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_show_another_order(dtype, simt):
    """The same tokens at other positions have other bits: the tests above would see it."""
    arguments = cancelling_inputs(chain(5), 100, query_heads=3, kv_heads=1, head_size=64, dtype=dtype)
    wanted = simt("tree_attention", *arguments.values())
    for order in ([*range(99, -1, -1)], [*range(8, 100), *range(8)]):
        changed = dict(arguments)
        for name in ("keys", "values"):
            changed[name] = arguments[name][:, :, [*order, *range(100, 108)]].contiguous()
        got = simt("tree_attention", *changed.values())
        assert not torch.equal(got[:, 0], wanted[:, 0])
