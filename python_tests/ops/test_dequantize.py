"""Blocks of a file as numbers: those of gguf's own dequantization, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from cerberus_ext.ops.blocks import BLOCK_SIZES, dequantize_blocks
from cerberus_ext.ops.native import native

KINDS = [GGMLQuantizationType(kind) for kind in BLOCK_SIZES]
# Bytes of a block at which a float16 begins.
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
ODD = (0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00)  # 0, subnormal, inf, NaN ...


def random_rows(kind: GGMLQuantizationType, rows: int, blocks: int) -> np.ndarray:
    """Of random bytes; in the first blocks every pair of odd scales."""
    random = np.random.default_rng(int(kind))
    raw = random.integers(0, 256, (rows * blocks, BLOCK_SIZES[kind][1]), dtype=np.uint8)
    for place in SCALES[kind.name]:
        chosen = random.permutation(np.array(ODD, dtype="<u2"))
        raw[: len(ODD), place : place + 2] = chosen.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "blocks"), [(1, 11), (33, 3), (0, 2), (700, 9)])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_numbers_are_those_of_gguf(kind: GGMLQuantizationType, dtype: torch.dtype, rows: int, blocks: int) -> None:
    assert BLOCK_SIZES[kind] == GGML_QUANT_SIZES[kind]
    raw = random_rows(kind, rows, blocks) if rows else np.empty((0, blocks * BLOCK_SIZES[kind][1]), dtype=np.uint8)
    got = dequantize_blocks(torch.from_numpy(raw), int(kind), dtype)
    assert got.dtype == dtype and got.shape == (rows, blocks * BLOCK_SIZES[kind][0])
    if rows:
        want = torch.from_numpy(dequantize(raw, kind)).to(dtype)
        number = ~want.isnan()
        assert got.isnan().equal(~number)
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert got[number].view(bits).equal(want[number].view(bits))  # zeros with their signs


def test_parts_of_many_rows() -> None:
    """More than are made at once, at a place that no float32 may lie at."""
    raw = torch.from_numpy(random_rows(GGMLQuantizationType.Q8_0, 3000, 16)).view(-1)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), raw])[1:].view(3000, -1)
    for dtype in (torch.float32, torch.bfloat16):
        want = torch.cat([dequantize_blocks(rows.contiguous(), 8, dtype) for rows in shifted.split(977)])
        assert dequantize_blocks(shifted, 8, dtype).nan_to_num().equal(want.nan_to_num())


def test_what_is_refused() -> None:
    blocks, weights = torch.zeros(2, 36, dtype=torch.uint8), torch.zeros(2, 64)
    with pytest.raises(RuntimeError, match="^dequantize_blocks: kind must be 2, 3, 6, 7, 8, 12 or 14, got 13"):
        native.dequantize_blocks(blocks, 13, weights)
    with pytest.raises(RuntimeError, match="^dequantize_blocks: blocks must be .* a multiple of 18, got 35"):
        native.dequantize_blocks(blocks[:, 1:].contiguous(), 2, weights)
    with pytest.raises(RuntimeError, match=r"^dequantize_blocks: weights must be \(R, I\) = \(2, 64\), got"):
        native.dequantize_blocks(blocks, 2, weights[:1])
    with pytest.raises(RuntimeError, match="^dequantize_blocks: weights must be torch.float32, got torch.bfloat16"):
        native.dequantize_blocks(blocks, 2, weights.bfloat16())
