"""A step's end in one call, against the ops that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cerberus_ext import ops
from cerberus_ext.ops.step import settle

PARENTS = torch.tensor([-1, 0, 0, 1, 3, 2])
ANCESTORS = torch.tensor([[1], [3], [5], [11], [27], [37]])


def call(*target: list[int], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Of as many texts of 6 nodes as targets."""
    generator, texts = torch.Generator().manual_seed(0), range(len(target))
    caches = [torch.randn(4, 1, 2, 16, 3, generator=generator).bfloat16() for _ in texts]
    hidden = torch.randn(6 * len(target), 5, generator=generator).to(dtype)
    chosen, draft = torch.tensor(target).flatten(), torch.tensor([9, 1, 2, 3, 4, 5] * len(target))
    return [
        draft, chosen, PARENTS.repeat(len(target)), [ANCESTORS for _ in texts], caches,
        [torch.tensor([7 - text]) for text in texts], hidden, [torch.zeros(1, 5, dtype=dtype) for _ in texts],
        [torch.zeros(1, dtype=torch.int64) for _ in texts], torch.zeros(6 * len(target), dtype=torch.int64),
    ]  # fmt: skip


CASES = [
    ([0] * 6, [0]),
    ([1, 3, 0, 4, 8, 0], [0, 1, 3, 4]),
    ([2, 0, 5, 0, 0, 6], [0, 2, 5]),
    ([1, 0, 0, 4, 0, 0], [0, 1]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cases", [*([case] for case in CASES), CASES, CASES[1::-1]])
def test_is_what_the_ops_do(cases: list[tuple[list[int], list[int]]], dtype: torch.dtype) -> None:
    """Of one text, and of several with caches of their own."""
    targets = [target for target, _ in cases]
    settled, others = call(*targets, dtype=dtype), call(*targets, dtype=dtype)
    settle(*settled)
    for text, (target, nodes) in enumerate(cases):
        here = slice(6 * text, 6 * text + 6)
        cache, length, state, pending = (settled[place][text] for place in (4, 5, 7, 8))
        path, accepted = ops.verify_tree(others[0][None, here], others[1][None, here], PARENTS, ANCESTORS, 5)
        ops.commit_cache(others[4][text], others[5][text], path, accepted)
        assert cache.equal(others[4][text]) and length.equal(others[5][text])
        assert settled[9][here].equal(path[0].long())
        assert settled[9][here].tolist() == [*nodes, *[-1] * (6 - len(nodes))]
        assert state.equal(settled[6][None, here][:, nodes[-1]]) and pending.tolist() == [target[nodes[-1]]]


def test_texts_without_drafts() -> None:
    """Beside one that has some: the pending token is always accepted."""
    draft, target, parents, ancestors, caches, lengths, hidden, states, pending, path = call(
        [0] * 6, [1, 3, 0, 4, 8, 0]
    )
    before = caches[0].clone()
    alone = torch.tensor([[1]])
    settle(
        draft[5:], target[5:], parents[5:].index_fill(0, torch.tensor([0]), -1), [alone, ancestors[1]], caches,
        lengths, hidden[5:], states, pending, path[5:],
    )  # fmt: skip
    assert caches[0].equal(before) and [length.item() for length in lengths] == [8, 10]
    assert states[0].equal(hidden[5:6]) and path[5:].tolist() == [0, 0, 1, 3, 4, -1, -1]


def test_refused() -> None:
    long = torch.int64
    for place, wrong, message in (
        (1, torch.zeros(11, dtype=long), r"target must be \(N,\)"), (2, PARENTS.repeat(2).int(), "parents must be"),
        (3, [ANCESTORS, ANCESTORS[:4]], "ancestors must be of 12 nodes in all, like draft, got 10"),
        (3, [ANCESTORS, torch.zeros(7, 1, dtype=long)], "ancestors must be .* from 1 to the 6 nodes that are left"),
        (3, [ANCESTORS, torch.zeros(6, 2, dtype=long)], "ancestors must be"),
        (4, [torch.zeros(4, 2, 2, 16, 3)] * 2, "cache must be"),
        (5, [torch.tensor([7])], "length must be a tensor for each of ancestors, 2, got 1"),
        (7, [torch.zeros(1, 4)] * 2, "state must be"), (8, [torch.zeros(2, dtype=long)] * 2, "pending must be"),
        (9, torch.zeros(6, dtype=long), "path must be"),
    ):  # fmt: skip
        arguments = call([0] * 6, [0] * 6)
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=f"^settle: {message}"):
            settle(*arguments)


def test_ancestors_that_are_not_those_of_the_parents() -> None:
    """Bits beyond the nodes count as depth, but are no nodes: where the path ends before, node 0 is the last."""
    arguments = call([1, 3, 0, 4, 8, 0])
    arguments[3] = [torch.full((6, 1), 7 << 60)]
    settle(*arguments)
    assert arguments[7][0].equal(arguments[6][:1]) and arguments[8][0].item() == 1
