"""A native step over the nodes of several texts: each has the bits that it has alone, and malformed calls are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cerberus_ext.ops.step import NativeStep
from cerberus_ext.target.step_row import chain_ancestors

WIDTH, VOCAB, KV_HEADS, SIZE = 8, 11, 1, 4
TEXTS = [(0, 3), (5, 1), (2, 70), (31, 2)]  # tokens that are there, nodes


def code() -> tuple[list[Tensor], list[int]]:
    """Embeds a token, puts parts of it into the cache, attends with all of it, and multiplies that by the table."""
    torch.manual_seed(0)
    row, none = [0, 0, 1], [0] * 6
    numbers = [1, 0, 1, KV_HEADS, SIZE, 3, 4, 1, 2, WIDTH, 0, WIDTH, 0, VOCAB, 0]
    numbers += [1, 0, 1, 0, 0, 1, 1, WIDTH, 2, 0, 0, *row, 5, 0, 0, *row, *none]
    numbers += [1, 0, 2, 0, 0, 1, KV_HEADS, SIZE, 6, 0, 0, 0, SIZE, 1, 2, 0, 0, 0, SIZE, 1, *none]
    numbers += [0, 0, 1, KV_HEADS, SIZE, 7, 0, 0, 0, SIZE, 1, 2, 0, SIZE, 0, SIZE, 1, *none]
    numbers += [2, 0, 0, 1, 2, 0x3F000000, 0, 0, -1]
    numbers += [0, 1, 2, 0, WIDTH, VOCAB, -1, 0]
    return [torch.randn(VOCAB, WIDTH)], numbers


def native() -> NativeStep:
    tensors, numbers = code()
    return NativeStep(tensors, torch.tensor(numbers))


def arguments(texts: list[tuple[int, int]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    nodes = sum(count for _, count in texts)
    caches = [torch.randn(2, 1, KV_HEADS, length + count + 1, SIZE, generator=generator) for length, count in texts]
    return {
        "tokens": torch.cat([(torch.arange(count) + 3 * count) % VOCAB for _, count in texts]),
        "positions": torch.cat([length + torch.arange(count) for length, count in texts]),
        "length": [torch.tensor([length]) for length, _ in texts],
        "ancestors": [chain_ancestors(count) for _, count in texts],
        "cache": caches,
        "hidden": torch.zeros(nodes, WIDTH),
        "logits": torch.zeros(nodes, VOCAB),
    }


@pytest.mark.parametrize("threads", [1, 3])
def test_each_text_has_the_bits_that_it_has_alone(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step, together = native(), arguments(TEXTS)
        step.run(**together)
        first = 0
        for index, (length, count) in enumerate(TEXTS):
            alone = arguments(TEXTS)
            part = slice(first, first + count)
            one = {name: alone[name][index : index + 1] for name in ("length", "ancestors", "cache")}
            rows = {name: alone[name][part].clone() for name in ("tokens", "positions", "hidden", "logits")}
            step.run(**one, **rows)
            assert rows["hidden"].abs().sum() > 0 and rows["hidden"].equal(together["hidden"][part])
            assert rows["logits"].equal(together["logits"][part])
            assert one["cache"][0].equal(together["cache"][index])
            assert not one["cache"][0][0, 0, 0, length].equal(arguments(TEXTS)["cache"][index][0, 0, 0, length])
            first += count
    finally:
        torch.set_num_threads(before)


def test_a_text_whose_slots_are_outside_writes_nothing() -> None:
    """Neither there nor into another text's cache."""
    step = native()
    for length in (-1, -(2**63), 2**63 - 1, 34, 1000):
        given = arguments(TEXTS)
        given["length"][3] = torch.tensor([length])
        kept = given["cache"][3].clone()
        step.run(**given)
        assert given["cache"][3].equal(kept), length


def _without_last(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda given: given[name].pop()


def _replaced(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def replace(given: dict[str, Any]) -> None:
        given[name][1] = value

    return replace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: given.update(length=[], ancestors=[], cache=[]), "length must be one or more tensors, got 0"),
        (_without_last("ancestors"), "ancestors must be a tensor for each of length, 4, got 3"),
        (_without_last("cache"), "cache must be a tensor for each of length, 4, got 3"),
        (_without_last("length"), "ancestors must be a tensor for each of length, 3, got 4"),
        (_replaced("length", torch.zeros(2, dtype=torch.int64)), "length must be (1,)"),
        (_replaced("length", torch.zeros(1)), "length must be torch.int64"),
        (_replaced("ancestors", chain_ancestors(2)), "ancestors must be (N, W) with N from 1 to the 1 tokens"),
        (_replaced("ancestors", chain_ancestors(1)[:0]), "ancestors must be (N, W) with N from 1 to the 73 tokens"),
        (_replaced("ancestors", torch.zeros(1, 2, dtype=torch.int64)), "ancestors must be (N, W)"),
        (lambda given: given.update(ancestors=[chain_ancestors(1)] * 4), "ancestors must be of 76 nodes in all"),
        (_replaced("cache", torch.zeros(2, 1, KV_HEADS, 9, SIZE + 1)), "cache must be (C, 1, Hkv, S, E)"),
        (_replaced("cache", torch.zeros(2, 1, KV_HEADS, 9)), "cache must be (C, 1, Hkv, S, E)"),
        (_replaced("cache", torch.zeros(1, 1, KV_HEADS, 9, SIZE)), "cache must be (C, 1, Hkv, S, E) with C >= 2"),
        (_replaced("cache", torch.zeros(2, 1, KV_HEADS, 9, SIZE).half()), "cache must be torch.float32"),
        (_replaced("cache", torch.zeros(2, 1, KV_HEADS, SIZE, 9).mT), "cache must be contiguous"),
    ],
)
def test_malformed_texts_are_refused_by_name(change: Callable[[dict[str, Any]], None], message: str) -> None:
    given = arguments(TEXTS)
    change(given)
    with pytest.raises(RuntimeError) as refused:
        native().run(**given)
    assert f"run_step: {message}" in str(refused.value)
