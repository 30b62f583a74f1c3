"""A step's end in one call, against the ops that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops.step import settle

PARENTS = torch.tensor([-1, 0, 0, 1, 3, 2])
ANCESTORS = torch.tensor([[1], [3], [5], [11], [27], [37]])


def call(target: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(4, 1, 2, 16, 3, generator=generator).bfloat16()
    hidden = torch.randn(1, 6, 5, generator=generator).to(dtype)
    draft = torch.tensor([[9, 1, 2, 3, 4, 5]])
    return [
        draft, torch.tensor([target]), PARENTS, ANCESTORS, cache, torch.tensor([7]), hidden,
        torch.zeros(1, 5, dtype=dtype), torch.zeros(1, dtype=torch.int64), torch.zeros(1, 6, dtype=torch.int64),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("target", "nodes"),
    [([0] * 6, [0]), ([1, 3, 0, 4, 8, 0], [0, 1, 3, 4]), ([2, 0, 5, 0, 0, 6], [0, 2, 5]), ([1, 0, 0, 4, 0, 0], [0, 1])],
)
def test_is_what_the_ops_do(target: list[int], nodes: list[int], dtype: torch.dtype) -> None:
    one, others = call(target, dtype), call(target, dtype)
    settle(*one)
    draft, chosen, parents, ancestors, cache, length, hidden, *_ = others
    path, accepted = ops.verify_tree(draft, chosen, parents, ancestors, 5)
    ops.commit_cache(cache, length, path, accepted)
    assert one[4].equal(cache) and one[5].equal(length) and one[9].equal(path.long())
    assert one[9].tolist() == [[*nodes, *[-1] * (6 - len(nodes))]]
    assert one[7].equal(hidden[:, nodes[-1]]) and one[8].tolist() == [target[nodes[-1]]]


def test_refused() -> None:
    for place, wrong, message in (
        (1, torch.zeros(1, 5, dtype=torch.int64), r"target must be \(1, N\)"), (2, PARENTS.int(), "parents must be"),
        (3, ANCESTORS[:4], "ancestors must be"), (4, torch.zeros(4, 2, 2, 16, 3), "cache must be"),
        (7, torch.zeros(1, 4), "state must be"), (9, torch.zeros(2, 6, dtype=torch.int64), "path must be"),
    ):  # fmt: skip
        arguments = call([0] * 6)
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match=f"^settle: {message}"):
            settle(*arguments)


def test_ancestors_that_are_not_those_of_the_parents() -> None:
    """Bits beyond the nodes count as depth, but are no nodes: where the path ends before, node 0 is the last."""
    arguments = call([1, 3, 0, 4, 8, 0])
    arguments[3] = torch.full((6, 1), 7 << 60)
    settle(*arguments)
    assert arguments[7].equal(arguments[6][:, 0]) and arguments[8].item() == 1
