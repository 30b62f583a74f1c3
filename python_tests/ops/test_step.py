"""The native step: what its code may say is checked number by number, and its memory is its own."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops.native import native
from cerberus_ext.ops.step import NativeStep, pack_weights, packed_bytes

WIDTH, OUT, VOCAB = 37, 7, 11
NONE = [0] * 6


def row(space: int, index: int, offset: int = 0) -> list[int]:
    return [space, index, offset, 0, 0, 1]


def linear_step(dtype: torch.dtype, packed: bool) -> tuple[list[Tensor], list[int]]:
    """Embeds the tokens and multiplies them: tensors and code."""
    torch.manual_seed(0)
    embeddings, weight, bias = (torch.randn(size).to(dtype) for size in ((VOCAB, WIDTH), (OUT, WIDTH), (OUT,)))
    multiplied = weight
    if packed:
        multiplied = torch.full((packed_bytes(weight, OUT),), 255, dtype=torch.uint8)
        pack_weights([weight[:2].contiguous(), weight[2:].contiguous()], multiplied)
    kind = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
    code = [1, kind, 1, 1, 4, 2, 2, 0, 1, WIDTH, 0, OUT, 0]
    code += [1, 0, 1, 0, 0, 1, 1, WIDTH, *row(2, 0), *row(5, 0), *NONE]
    code += [0, 0, 1, 1, WIDTH, OUT, 2, int(packed)]
    return [embeddings, multiplied, bias, weight], code


def run(step: NativeStep, nodes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.arange(nodes) * 5 % VOCAB
    hidden, logits = torch.empty(nodes, WIDTH, dtype=dtype), torch.empty(nodes, OUT, dtype=dtype)
    ancestors, cache = torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64), torch.zeros(2, 1, 1, 8, 4, dtype=dtype)
    step.run(tokens, torch.arange(nodes), torch.tensor([3]), ancestors, cache, hidden, logits)
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


@pytest.mark.parametrize("size", [1, 3, 7, 8, 31, 64, 576, 577, 4096, 16384, 99999])
def test_a_mean_has_torchs_bits(size: int) -> None:
    torch.manual_seed(size)
    values = torch.randn(4, size)
    code = [1, 0, 1, 1, 4, 3, 1, 1, 2, size, 0, 1, 0, 1, 0]
    code += [1, 0, 1, 12, 0, 1, 1, size, *row(2, 1), *row(5, 0), *NONE]
    step = NativeStep([values], torch.tensor(code))
    mean, other = torch.empty(4, 1), torch.empty(4, 1)
    ancestors, nodes = torch.zeros(4, 1, dtype=torch.int64), torch.arange(4)
    step.run(nodes, nodes, torch.tensor([0]), ancestors, torch.zeros(2, 1, 1, 8, 4), mean, other)
    assert mean.equal(values.mean(-1, keepdim=True))


def test_codes_that_are_wrong_are_refused_or_harmless() -> None:
    """Any number of a code replaced by any other: nothing outside of the step's memory is read or written."""
    tensors, code = linear_step(torch.float32, packed=False)
    generator, refused = random.Random(0), 0
    for _ in range(4000):
        wrong = list(code)
        for _ in range(generator.choice((1, 1, 2, 4))):
            value = generator.choice((-1, 0, 1, 2, 3, 8, 30, 36, 38, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)))
            wrong[generator.randrange(len(wrong))] = value
        wrong = wrong[: generator.choice((len(wrong), generator.randrange(len(wrong) + 1)))]
        try:
            step = NativeStep(tensors, torch.tensor(wrong, dtype=torch.int64))
            run(step, 3, torch.float32)
        except RuntimeError as error:
            assert str(error).startswith(("make_step: ", "run_step: ")), error
            refused += 1
    assert refused > 2000


def test_a_step_that_is_gone_is_named() -> None:
    with pytest.raises(RuntimeError, match="step_times: step must be one that make_step has returned, got -5"):
        native.step_times(-5, True)
