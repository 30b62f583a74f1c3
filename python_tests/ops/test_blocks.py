"""Weights that came out of a file of fewer bits: found from their values, multiplied to the bits of what they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from block_weights import multiply, packed_in, q4_0, q4_1, q5_0, q5_1, q6_k, q8_0
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops.blocks import dequantize_blocks
from cerberus_ext.ops.step import BLOCKS, block_bytes, pack_blocks

BITS = [bits for bits in BLOCKS if block_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 1, bits)]
FILE_KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q6_K")
BITS_OF = {q4_1: 4, q4_0: 4, q5_1: 5, q5_0: 5, q6_k: 6, q8_0: 8}
MAKERS = [make for make, bits in BITS_OF.items() if bits in BITS]

pytestmark = pytest.mark.skipif(not BITS, reason="this processor makes no weights of blocks")


def packed(*weights: Tensor) -> Tensor | None:
    """In the fewest bits in which they can be given."""
    every = (packed_in(bits, *weights) for bits in BITS)
    return next((memory for memory in every if memory is not None), None)


@pytest.mark.parametrize("make", MAKERS)
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


@pytest.mark.parametrize("kinds", [(q4_1, q4_0, q4_1), (q5_1, q5_0, q5_1), (q6_k, q6_k, q6_k), (q8_0, q8_0, q8_0)])
def test_several_weights_one_behind_the_other(kinds: tuple[Callable[..., Tensor], ...]) -> None:
    if any(make not in MAKERS for make in kinds):
        pytest.skip("this processor has no such blocks")
    weights = [make(rows, 64, seed=rows) for make, rows in zip(kinds, (5, 4, 1), strict=True)]
    memory, x = packed(*weights), torch.randn(4, 64).bfloat16()
    assert memory is not None
    assert multiply(memory, torch.Size((10, 64)), x).equal(ops.linear(x, torch.cat(weights), None))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("scale", [1e-5, 1e-4, 1e-3, 0.05, 1.0, 300.0])
def test_every_block_of_many_is_found(scale: float, make: Callable[..., Tensor]) -> None:
    """With scales that float16 has as subnormal numbers, too."""
    for seed in range(4):
        assert packed(make(64, 1024, scale, seed)) is not None


def raw_blocks(kind: GGMLQuantizationType, count: int) -> np.ndarray:
    """As in a file: of random integers, each of which is as large as it can be once, and scales of every kind."""
    random = np.random.default_rng(0)
    scales = random.integers(0, 1 << 16, (count, 2), dtype=np.uint16)  # float16 numbers of all exponents, and NaN
    scales[:8, 0] = 0, 0x8000, 1, 0x8001, 0x03FF, 0x7C00, 0xFC00, 0x7BFF
    if kind == GGMLQuantizationType.Q8_0:
        integers = random.integers(-127, 128, (count, 32), dtype=np.int8)
        integers[:, 7] = 127
        return np.hstack([scales[:, :1].view(np.uint8), integers.view(np.uint8)])
    used = np.ascontiguousarray(scales[:, : 2 if kind.name in ("Q4_1", "Q5_1") else 1]).view(np.uint8)
    if kind == GGMLQuantizationType.Q6_K:
        return np.hstack([random.integers(0, 256, (count, 208), dtype=np.uint8), used])
    codes = random.integers(0, 256, (count, 16), dtype=np.uint8)
    codes[:, :2] = 0x0F
    if kind.name in ("Q4_0", "Q4_1"):
        return np.hstack([used, codes])
    fifth = random.integers(0, 256, (count, 4), dtype=np.uint8)
    fifth[:, 0] |= 3  # of the two largest, and not of the two least
    fifth[:, 2] &= 0xFC
    return np.hstack([used, fifth, codes])


@pytest.mark.parametrize("kind", [GGMLQuantizationType[name] for name in FILE_KINDS])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_blocks_of_a_file(kind: GGMLQuantizationType) -> None:
    """What is packed has the bits of gguf's own numbers. What is not finite, or a zero of the other sign, is left as it
    is, and little else: nothing with positive scales of ordinary size."""
    count = 0
    raw = raw_blocks(kind, 1000)
    values = torch.from_numpy(dequantize(raw, kind))
    x = torch.randn(3, values.shape[1]).bfloat16()
    for block, value in zip(raw, values.bfloat16(), strict=True):
        weight = value[None].contiguous()
        memory = packed(weight)
        if memory is not None:
            assert weight.isfinite().all()
            sums = multiply(memory, weight.shape, x)
            assert sums.view(torch.int16).equal(ops.linear(x, weight, None).view(torch.int16))
            count += 1
        else:
            place = 208 if kind == GGMLQuantizationType.Q6_K else 0
            scale = block[place : place + 2].view(np.float16)[0]
            assert not 1e-3 < scale < 1e3 or kind.name in ("Q4_1", "Q5_1"), scale
    assert count > 300


def super_blocks(rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Q4_K as ggml makes it: in every 32 weights the least is not above 0, and few have all 16 values."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows * blocks, 144), dtype=np.uint8)
    d = (random.uniform(0.5, 2, rows * blocks) * 10.0 ** random.integers(-6, 0, rows * blocks)).astype(np.float16)
    raw[:, :2] = d[:, None].view(np.uint8)
    raw[:, 2:4] = (d * np.float16(random.integers(1, 9)))[:, None].view(np.uint8)
    factors, least = random.integers(0, 64, (2, rows * blocks, 8), dtype=np.uint8)
    least = np.minimum(least, factors)  # m of no more than 8 d
    raw[:, 4:8] = factors[:, :4] | (factors[:, 4:] >> 4) << 6
    raw[:, 8:12] = least[:, :4] | (least[:, 4:] >> 4) << 6
    raw[:, 12:16] = factors[:, 4:] & 15 | (least[:, 4:] & 15) << 4
    return raw.reshape(rows, -1)


@pytest.mark.skipif(4 not in BITS, reason="this processor has no such blocks")
def test_super_blocks_are_found() -> None:
    """Factors times float16 numbers, with all weights 0, too. Tensors of other numbers are left."""
    for seed in range(4):
        raw = super_blocks(40, 3, seed)
        weight = dequantize_blocks(torch.from_numpy(raw), 12, torch.bfloat16)
        x = torch.randn(5, weight.shape[1]).bfloat16()
        memory = packed_in(4, weight)
        assert memory is not None
        assert multiply(memory, weight.shape, x).equal(ops.linear(x, weight, None))
        weight[7, 96:128] = torch.randn(32)
        assert packed_in(4, weight) is None


@pytest.mark.skipif(4 not in BITS, reason="this processor has no such blocks")
def test_super_blocks_in_five_bits() -> None:
    """Q5_K, which no code here reads: factors as in Q4_K, and a fifth bit of every weight."""
    raw = super_blocks(40, 3).reshape(-1, 144)
    fifth = np.random.default_rng(1).integers(0, 256, (len(raw), 32), dtype=np.uint8)
    blocks = np.hstack([raw[:, :16], fifth, raw[:, 16:]])
    weight = torch.from_numpy(dequantize(blocks, GGMLQuantizationType.Q5_K)).bfloat16().view(40, -1)
    memory, x = packed_in(5, weight), torch.randn(5, weight.shape[1]).bfloat16()
    assert memory is not None and packed_in(4, weight) is None
    assert multiply(memory, weight.shape, x).equal(ops.linear(x, weight, None))


@pytest.mark.skipif(4 not in BITS, reason="this processor has no such blocks")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_super_blocks_of_any_bytes() -> None:
    """What is packed has the bits of gguf's own numbers; little is left, of blocks far from 0 beside their steps."""
    raw = np.random.default_rng(5).integers(0, 256, (120, 144), dtype=np.uint8)
    raw[:5, :2] = np.array([0, 0x8000, 0x7C00, 1, 0x7E00], dtype="<u2")[:, None].view(np.uint8)
    weight = torch.from_numpy(dequantize(raw, GGMLQuantizationType.Q4_K)).bfloat16().view(-1, 32)
    x, count, finite = torch.randn(3, 32).bfloat16(), 0, 0
    for row in weight[:, None]:
        memory = packed_in(4, row)
        finite += bool(row.isfinite().all())
        if memory is not None:
            sums = multiply(memory, row.shape, x)
            assert row.isfinite().all()
            assert sums.view(torch.int16).equal(ops.linear(x, row, None).view(torch.int16))
            count += 1
    assert count > 0.9 * finite > 300


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
        memories = [packed_in(bits, weight) for bits in BITS]
        for memory in (memory for memory in memories if memory is not None):
            sums = multiply(memory, weight.shape, x)
            assert sums.view(torch.int16).equal(ops.linear(x, weight, None).view(torch.int16))
            assert sums.item() == 0
        assert [bits for bits, memory in zip(BITS, memories, strict=True) if memory is not None] == [4, 5, 6]


def test_a_zero_of_the_other_sign_is_not_the_same() -> None:
    for weight in (torch.arange(16.0).repeat(6).view(3, 32).bfloat16(), q8_0(3, 32)):
        assert packed(weight) is not None or 8 not in BITS
        weight[1] = weight[1].where(weight[1] == weight[1].abs().amax(), 0)
        assert packed(weight) is not None
        weight[1, weight[1].argmin()] = -0.0
        assert packed(weight) is None


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_as_it_is(value: float, make: Callable[..., Tensor]) -> None:
    weight = make(3, 64)
    weight[1, 40] = value
    assert packed(weight) is None


@pytest.mark.parametrize("make", MAKERS)
def test_other_weights_are_left_as_they_are(make: Callable[..., Tensor]) -> None:
    """Random ones, and those of a file of which one bit was changed, in any row and block."""
    assert packed(torch.randn(3, 64).bfloat16()) is None
    for row in range(7):
        weight = make(7, 128)
        changed = weight.view(torch.int16)
        place = (row * 37) % 128
        inside = weight[row, place // 32 * 32 :][:32]
        if weight[row, place] in (inside.amin(), inside.amax()):
            continue
        changed[row, place] ^= 1
        assert packed(weight) is None


@pytest.mark.parametrize("bits", BITS)
def test_subnormal_weights_are_multiplied_as_they_are_or_left(bits: int) -> None:
    """Rounding to bfloat16 is to so many bits of a number, of which a subnormal one has fewer. Their products are
    normal numbers all the same."""
    steps = [568, 568, 326, 976, 732, 163, 326, 326, 812, 1056, 812, 976, 81, 488, 488, 812, 1136, 652, 406, 326, 1056]
    steps += [976, 163, 1136, 81, 163, 1056, 1216, 1216, 732, 163, 812]
    weight, x = (torch.tensor([steps]).double() * 2.0**-133).bfloat16(), torch.ones(1, 32).bfloat16()
    memory = packed_in(bits, weight)
    assert memory is None or multiply(memory, weight.shape, x).equal(ops.linear(x, weight, None))


def test_what_cannot_be_packed_so_is_said() -> None:
    for bits in BITS:
        assert block_bytes(torch.empty(3, 33, dtype=torch.bfloat16), 3, bits) == 0
        assert block_bytes(torch.empty(3, 32), 3, bits) == 0
    with pytest.raises(RuntimeError, match="^block_bytes: bits must be 4, 5, 6 or 8, got 7"):
        block_bytes(torch.empty(3, 32), 3, 7)
    with pytest.raises(RuntimeError, match="^pack_blocks: weights must be of a kind that this processor packs so"):
        pack_blocks([torch.zeros(3, 33, dtype=torch.bfloat16)], torch.empty(1000, dtype=torch.int8))
    for short in (torch.empty(95, dtype=torch.int8), torch.empty(96, dtype=torch.uint8)):
        with pytest.raises(RuntimeError, match="^pack_blocks: packed must be torch.int8.* with 96 bytes, got"):
            pack_blocks([q4_1(3, 32)], short)


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_does_not_read_beyond_its_weights(make: Callable[..., Tensor]) -> None:
    """make_step counts them."""
    weight = make(7, 64)
    memory, x = packed(weight), torch.randn(2, 64).bfloat16()
    assert memory is not None
    with pytest.raises(RuntimeError, match="make_step: code: a weight's elements must be"):
        multiply(memory[:-2].clone(), weight.shape, x)
    with pytest.raises(RuntimeError, match="make_step: code: packing must be that of the weight"):
        multiply(memory.view(torch.uint8), weight.shape, x)
