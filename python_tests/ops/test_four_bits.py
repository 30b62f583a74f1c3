"""Weights that came out of a 4-bit file: found from their values, and multiplied to the bits of what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from four_bit_weights import q4_0, q4_1
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops.step import NativeStep, four_bit_bytes, pack_four_bits

VOCAB = 11

pytestmark = pytest.mark.skipif(
    not four_bit_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 1), reason="this processor looks no weights up"
)


def packed(*weights: Tensor) -> Tensor | None:
    rows = sum(len(weight) for weight in weights)
    memory = torch.full((four_bit_bytes(weights[0], rows),), 85, dtype=torch.int8)
    return memory if pack_four_bits(weights, memory) else None


def multiply(weights: Tensor, shape: torch.Size, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I) @ the packed weights (O, I)^T, by a step whose embeddings are x."""
    nodes, (out_size, size) = len(x), shape
    tensors = [x, weights] if bias is None else [x, weights, bias]
    code = [1, 1, 1, 1, 4, 2, 2, 0, 1, size, 0, out_size, 0]
    code += [1, 0, 1, 0, 0, 1, 1, size, 2, 0, 0, 0, 0, 1, 5, 0, 0, 0, 0, 1, *[0] * 6]
    code += [0, 0, 1, 1, size, out_size, -1 if bias is None else 2, 2]
    step = NativeStep(tensors, torch.tensor(code))
    hidden, logits = torch.empty_like(x), torch.empty(nodes, out_size, dtype=x.dtype)
    ancestors, index = torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64), torch.arange(nodes)
    step.run(
        index, index, [torch.tensor([0])], [ancestors], [torch.zeros(2, 1, 1, 8, 4, dtype=x.dtype)], hidden, logits
    )
    return logits


@pytest.mark.parametrize("make", [q4_1, q4_0])
@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 8, 9, 16, 17, 40, 70])
@pytest.mark.parametrize(("out_size", "size"), [(1, 32), (2, 64), (3, 576), (50, 96), (200, 288)])
def test_products_have_the_bits_of_linear(
    out_size: int, size: int, nodes: int, make: Callable[[int, int], Tensor]
) -> None:
    weight, x = make(out_size, size), torch.randn(nodes, size).bfloat16()
    bias = None if nodes % 2 else torch.randn(out_size).bfloat16()
    memory = packed(weight)
    assert memory is not None
    assert multiply(memory, weight.shape, x, bias).equal(ops.linear(x, weight, bias))


def test_several_weights_one_behind_the_other() -> None:
    weights = [q4_1(5, 64, seed=1), q4_0(4, 64, seed=2), q4_1(1, 64, seed=3)]
    memory, x = packed(*weights), torch.randn(4, 64).bfloat16()
    assert memory is not None
    assert multiply(memory, torch.Size((10, 64)), x).equal(ops.linear(x, torch.cat(weights), None))


@pytest.mark.parametrize("make", [q4_1, q4_0])
@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.05, 1.0, 300.0])
def test_every_block_of_many_is_found(scale: float, make: Callable[..., Tensor]) -> None:
    """With scales that float16 has as subnormal numbers, too."""
    for seed in range(4):
        assert packed(make(64, 1024, scale, seed)) is not None


def test_weights_that_are_all_the_same() -> None:
    weight = torch.tensor([[0.0], [-0.0], [1.5], [-3e30]]).expand(4, 64).bfloat16().contiguous()
    memory, x = packed(weight), torch.randn(3, 64).bfloat16()
    assert memory is not None
    assert multiply(memory, torch.Size((4, 64)), x).equal(ops.linear(x, weight, None))


def test_zeros_keep_their_sign() -> None:
    """Where q counts from -8 and d is negative, the zero is -0: it shows in a sum that has underflowed to -0."""
    for sign in (1.0, -1.0):
        weight = torch.tensor([sign * 2.0**-24, -0.0 * sign]).repeat(16)[None].bfloat16()
        weight[0, 0] *= 8
        x = torch.tensor([-sign * 2.0**-133, 1.0]).repeat(16)[None].bfloat16()
        memory = packed(weight)
        assert memory is not None
        sums = multiply(memory, weight.shape, x)
        assert sums.view(torch.int16).equal(ops.linear(x, weight, None).view(torch.int16))
        assert sums.item() == 0


def test_a_zero_of_the_other_sign_is_not_the_same() -> None:
    weight = torch.arange(16.0).repeat(6).view(3, 32).bfloat16()
    assert packed(weight) is not None
    weight[1, 0] = -0.0
    assert packed(weight) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_as_it_is(value: float) -> None:
    weight = q4_1(3, 64)
    weight[1, 40] = value
    assert packed(weight) is None


def test_other_weights_are_left_as_they_are() -> None:
    """Random ones, and those of a file of which one bit was changed, in any row and block."""
    assert packed(torch.randn(3, 64).bfloat16()) is None
    for row in range(7):
        weight = q4_1(7, 128)
        changed = weight.view(torch.int16)
        place = (row * 37) % 128
        inside = weight[row, place // 32 * 32 :][:32]
        if weight[row, place] in (inside.amin(), inside.amax()):
            continue
        changed[row, place] ^= 1
        assert packed(weight) is None


def test_what_cannot_be_packed_so_is_said() -> None:
    assert four_bit_bytes(torch.empty(3, 33, dtype=torch.bfloat16), 3) == 0
    assert four_bit_bytes(torch.empty(3, 32), 3) == 0
    with pytest.raises(RuntimeError, match="^pack_four_bits: weights must be of a kind that this processor packs so"):
        pack_four_bits([torch.zeros(3, 33, dtype=torch.bfloat16)], torch.empty(1000, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="^pack_four_bits: packed must be torch.int8 with 96 elements, got"):
        pack_four_bits([q4_1(3, 32)], torch.empty(95, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="^pack_four_bits: packed must be torch.int8 with 96 elements, got"):
        pack_four_bits([q4_1(3, 32)], torch.empty(96, dtype=torch.uint8))


def test_a_step_does_not_read_beyond_its_weights() -> None:
    """make_step counts them."""
    weight = q4_1(7, 64)
    memory = packed(weight)
    assert memory is not None
    with pytest.raises(RuntimeError, match="make_step: code: a weight's elements must be"):
        multiply(memory[:-2].clone(), weight.shape, torch.randn(2, 64).bfloat16())
    with pytest.raises(RuntimeError, match="make_step: code: packing must be that of the weight"):
        multiply(memory.view(torch.uint8), weight.shape, torch.randn(2, 64).bfloat16())
