"""Products of weights in blocks, as launches of the CUDA kernels under emulation: the bits of the dense ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from block_weights import cancelling, q4_0, q4_1, q5_0, q5_1, q6_k, q8_0
from device_steps import PACKING, launches, product
from op_cases import assert_same_bits
from simt_library import Emulation
from step_codes import VOCAB
from torch import Tensor

from cerberus_ext.ops.device_step import device_block_bytes, pack_device_blocks
from cerberus_ext.ops.step import BLOCKS
from cerberus_ext.runtime.fused.device_weights import in_blocks

KINDS = {q4_0: torch.int8, q4_1: torch.int8, q5_0: torch.uint16, q5_1: torch.uint16, q8_0: torch.int32}
KINDS |= {q6_k: torch.int64}
kinds = pytest.mark.parametrize("kind", KINDS)
needs_avx512 = pytest.mark.skipif(
    not device_block_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 4), reason="packing needs AVX-512"
)
pytestmark = [pytest.mark.usefixtures("simt"), needs_avx512]


def nodes(count: int) -> Tensor:
    return torch.arange(count) * 5 % VOCAB


def equal(dense: Tensor, dtype: torch.dtype, counts: Sequence[int]) -> None:
    states, (dense,) = cancelling(dense)
    packed = in_blocks(dense)
    assert packed is not None and packed.dtype == dtype
    states[3, 7] = torch.inf
    for count in counts:
        want, got = (product([weight], [len(dense)], states, nodes(count)) for weight in (dense, packed))
        finite = nodes(count) != 3
        assert_same_bits(got[finite], want[finite])
        assert got.isnan().equal(want.isnan()) and got.nan_to_num().equal(want.nan_to_num())


@kinds
@pytest.mark.parametrize(("out_size", "size"), [(1, 64), (37, 96), (16, 4128)])
def test_has_the_bits_of_the_dense_product(
    kind: Callable[..., Tensor], out_size: int, size: int, simt: Emulation
) -> None:
    """Of rows that fill no tile, of more chunks than there are stages and of fewer than slices."""
    for seed, count in enumerate((1, 9, 17, 70)):
        simt.seed(seed)
        simt.device(ptx_version=90 if seed % 2 else 80)
        equal(kind(out_size, size), KINDS[kind], [count])


@pytest.mark.slow
@kinds
def test_every_number_of_rows(kind: Callable[..., Tensor]) -> None:
    equal(kind(37, 160), KINDS[kind], range(1, 66))


@kinds
def test_many_tiles(kind: Callable[..., Tensor], simt: Emulation) -> None:
    """Several for a block, whose columns are not shared."""
    simt.device(multiprocessors=1)
    equal(kind(700, 64), KINDS[kind], [3, 40])


@kinds
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_scales(kind: Callable[..., Tensor], scale: float) -> None:
    """Small ones, of which some d are subnormal float16 numbers, and large ones."""
    equal(kind(20, 64, scale=scale), KINDS[kind], [2])


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-39, -1e30])
def test_weights_that_are_all_the_same(value: float) -> None:
    equal(torch.full((16, 32), value).bfloat16(), torch.int8, [2])


def test_zeros_with_a_sign() -> None:
    """Which 4 bits from -8 on have where d is negative; a sum is +0 then, as it is of others."""
    dense = q4_0(16, 32)
    dense[:, :16] = -0.0
    packed = in_blocks(dense)
    assert packed is not None
    states = torch.zeros(VOCAB, 32).bfloat16()
    states[:, :16] = -1
    want, got = (product([weight], [16], states, nodes(2)) for weight in (dense, packed))
    assert_same_bits(got, want)


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan, 1e-39, 3e38])
def test_what_no_block_has_is_left(wrong: float) -> None:
    for place in (0, 63):
        dense = q4_1(40, 64)
        dense[39, place] = wrong
        assert in_blocks(dense) is None


def test_what_is_none_of_a_file_is_left() -> None:
    torch.manual_seed(0)
    assert in_blocks(torch.randn(16, 64).bfloat16()) is None
    assert in_blocks(q4_1(16, 64).half()) is None and in_blocks(q4_1(16, 64)[:, :33].contiguous()) is None
    mixed = torch.cat([q4_1(8, 64), q8_0(8, 64)])
    packed = in_blocks(mixed)
    assert packed is None or packed.dtype == torch.int32
    with pytest.raises(RuntimeError, match="pack_device_blocks: packed must be of 1536 bytes, got 32"):
        pack_device_blocks(q4_1(20, 64), torch.zeros(32, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="pack_device_blocks: weight must be of a kind that this processor packs so"):
        pack_device_blocks(q4_1(16, 64).half(), torch.zeros(768, dtype=torch.int8))
    with pytest.raises(RuntimeError, match="device_block_bytes: bits must be 4, 5, 6 or 8, got 7"):
        device_block_bytes(q4_1(16, 64), 7)
    assert set(BLOCKS.values()) == set(PACKING)


def test_parts_of_several_kinds() -> None:
    """A launch for each kind, with the bits of one launch of them all, whose columns are split by their number."""
    sizes, made = [20, 33, 7, 50, 16], [q4_1, None, q8_0, q4_0, q6_k]
    torch.manual_seed(2)
    states, dense = cancelling(
        *(
            torch.randn(size, 1056).bfloat16() if kind is None else kind(size, 1056, seed=place)
            for place, (size, kind) in enumerate(zip(sizes, made, strict=True))
        )
    )
    packed = [weight if kind is None else in_blocks(weight) for weight, kind in zip(dense, made, strict=True)]
    before = launches()
    want = product(dense, sizes, states, nodes(3))
    between = launches()
    got = product([weight for weight in packed if weight is not None], sizes, states, nodes(3))
    assert_same_bits(got, want)
    assert between - before == 2 and launches() - between == 5


def test_codes_that_name_other_blocks_are_refused() -> None:
    dense = q4_1(16, 64)
    packed = in_blocks(dense)
    assert packed is not None
    states, _ = cancelling(dense)
    for wrong, match in (
        (packed[:-1].clone(), "a weight's elements must be"),
        (packed.view(torch.uint8), "packing must be 0, where this processor has no other, got 1|packing must be"),
    ):
        with pytest.raises(RuntimeError, match=match):
            product([wrong], [16], states, nodes(1))
