"""The native step: what its code may say is checked number by number, and its memory is its own."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from step_codes import CHOSEN, EXPERTS, INNER, NONE, OUT, VOCAB, WIDTH, damaged, experts_step, linear_step, row
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops.native import native
from cerberus_ext.ops.step import NativeStep, packed_bytes


def run(step: NativeStep, nodes: int, dtype: torch.dtype, outputs: int = OUT) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.arange(nodes) * 5 % VOCAB
    hidden, logits = torch.empty(nodes, WIDTH, dtype=dtype), torch.empty(nodes, outputs, dtype=dtype)
    ancestors, cache = torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64), torch.zeros(2, 1, 1, 8, 4, dtype=dtype)
    step.run(tokens, torch.arange(nodes), [torch.tensor([3])], [ancestors], [cache], hidden, logits)
    return tokens, hidden, logits


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 8, 9, 17, 70])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_have_the_bits_of_linear(dtype: torch.dtype, packed: bool, nodes: int) -> None:
    if packed and not packed_bytes(torch.empty(OUT, WIDTH, dtype=dtype), OUT):
        pytest.skip("this processor packs nothing")
    tensors, code = linear_step(dtype, packed)
    tokens, hidden, logits = run(NativeStep(tensors, torch.tensor(code)), nodes, dtype)
    assert hidden.equal(tensors[0][tokens])
    assert logits.equal(ops.linear(tensors[0][tokens], tensors[3], tensors[2]))


@pytest.mark.parametrize("nodes", [1, 2, 9, 70])
@pytest.mark.parametrize("way", ["own", "packed", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_have_the_bits_of_grouped_linear(dtype: torch.dtype, way: str, nodes: int) -> None:
    if way == "packed" and not packed_bytes(torch.empty(INNER, WIDTH, dtype=dtype), INNER):
        pytest.skip("this processor packs nothing")
    tensors, code = experts_step(dtype, way == "packed", way == "transposed")
    (table, scores, first, bias, second), _ = experts_step(dtype, False, way == "transposed")
    step = NativeStep(tensors, torch.tensor(code))
    tokens, hidden, logits = run(step, nodes, dtype, CHOSEN * OUT + CHOSEN)
    values, chosen = scores[tokens].topk(CHOSEN)
    inner = ops.grouped_linear(table[tokens][:, None], first, bias, chosen, way == "transposed")
    outer = ops.grouped_linear(inner, second, None, chosen, way == "transposed")
    assert hidden.equal(table[tokens])
    assert logits.equal(torch.cat([outer.flatten(1), values], 1))


@pytest.mark.parametrize("different", [2, 5, 1 << 20])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (4, 2), (8, 8), (60, 6), (128, 1), (128, 2), (128, 8), (600, 9)])
def test_the_largest_of_a_row_are_torchs(size: int, count: int, different: int) -> None:
    """Of equal ones, too, of infinities and of what is no number."""
    torch.manual_seed(size)
    values = torch.randint(different, (40, size)).float()
    values[10:20].masked_fill_(torch.rand(10, size) < 0.1, torch.inf)
    values[20:30].masked_fill_(torch.rand(10, size) < 0.1, torch.nan)
    code = [1, 0, 1, 1, 4, 2, 1, 0, 1, count, 0, count, 0]
    code += [1, 0, 2, 31, 0, 1, count, size, 2, 0, 0, 0, 1, 0, *row(5, 0), *NONE]
    code += [32, 0, 1, count, size, 2, 1, 0, 0, 1, 0, *row(5, 0), 2, 0, 0, 0, 1, 0]
    step, nodes = NativeStep([values], torch.tensor(code)), torch.arange(40)
    places, found = torch.empty(40, count), torch.empty(40, count)
    ancestors = torch.zeros(40, 1, dtype=torch.int64)
    step.run(nodes, nodes, [torch.tensor([0])], [ancestors], [torch.zeros(2, 1, 1, 8, 4)], places, found)
    want = values.topk(count)
    assert places.equal(want.indices.float())
    assert found.view(torch.int32).equal(want.values.view(torch.int32))


@pytest.mark.parametrize("place", [-1.0, 5.0, 3e9, torch.inf, -torch.inf, torch.nan])
def test_an_expert_that_there_is_not(place: float) -> None:
    """Groups are numbers that a step computes: of none, the product is 0, and a place of no element is the nearest."""
    weight, table = torch.ones(EXPERTS, 3, 1), torch.ones(1, 1)
    code = [1, 0, 1, 1, 4, 3, 2, 0, 1, 1, 0, 3, 0, 1, 1]
    code += [1, 0, 2, 0, 0, 1, 1, 1, *row(2, 0), *row(3, 1), *NONE, 0, 0, 1, 1, 1, *row(2, 2), *row(3, 2), *NONE]
    code += [3, 0, 1, 0, 1, 3, -1, 0, 0, EXPERTS, 2, 1, 1]
    step = NativeStep([weight, table, torch.tensor([place])], torch.tensor(code))
    tokens, hidden, logits = torch.zeros(1, dtype=torch.int64), torch.empty(1, 1), torch.full((1, 3), 7.0)
    step.run(tokens, tokens, [tokens], [tokens[None]], [torch.zeros(2, 1, 1, 8, 4)], hidden, logits)
    assert logits.equal(torch.zeros(1, 3))


@pytest.mark.parametrize("size", [1, 3, 7, 8, 31, 64, 576, 577, 4096, 16384, 99999])
def test_a_mean_has_torchs_bits(size: int) -> None:
    torch.manual_seed(size)
    values = torch.randn(4, size)
    code = [1, 0, 1, 1, 4, 3, 1, 1, 2, size, 0, 1, 0, 1, 0]
    code += [1, 0, 1, 12, 0, 1, 1, size, *row(2, 1), *row(5, 0), *NONE]
    step = NativeStep([values], torch.tensor(code))
    mean, other = torch.empty(4, 1), torch.empty(4, 1)
    ancestors, nodes = torch.zeros(4, 1, dtype=torch.int64), torch.arange(4)
    step.run(nodes, nodes, [torch.tensor([0])], [ancestors], [torch.zeros(2, 1, 1, 8, 4)], mean, other)
    assert mean.equal(values.mean(-1, keepdim=True))


@pytest.mark.parametrize("of", [linear_step, experts_step])
def test_codes_that_are_wrong_are_refused_or_harmless(of: Callable[..., tuple[list[Tensor], list[int]]]) -> None:
    """Any number of a code replaced by any other: nothing outside of the step's memory is read or written."""
    tensors, code = of(torch.float32, packed=False)
    outputs = OUT if of is linear_step else CHOSEN * OUT + CHOSEN
    generator, refused = random.Random(0), 0
    for _ in range(4000):
        try:
            step = NativeStep(tensors, torch.tensor(damaged(code, generator), dtype=torch.int64))
            run(step, 3, torch.float32, outputs)
        except RuntimeError as error:
            assert str(error).startswith(("make_step: ", "run_step: ")), error
            refused += 1
    assert refused > 2000


def test_a_step_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match="step_times: step must be one that make_step has returned, got -5"):
        native.step_times(-5, True)
