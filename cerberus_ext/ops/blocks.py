"""Weights in the blocks of a file, as numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import native

# By ggml's number of a kind: weights of a block, and its bytes. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q6_K.
BLOCK_SIZES = {2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 12: (256, 144), 14: (256, 210)}
_AT_ONCE = 1 << 20  # weights: their float32 numbers stay in the caches


def dequantize_blocks(blocks: Tensor, kind: int, dtype: torch.dtype) -> Tensor:
    """blocks (R, n) uint8, contiguous, on the CPU: rows of a file's blocks -> (R, I) of the dtype.

    kind: ggml's number, one of BLOCK_SIZES. The numbers are those of gguf's `dequantize`, rounded to the dtype.
    Raises RuntimeError on another kind, dtype or shape.
    """
    weights, size = BLOCK_SIZES.get(kind, (0, 1))
    rows, width = len(blocks), blocks.shape[-1] // size * weights
    made = torch.empty(rows, width, dtype=dtype)
    of_part = max(1, _AT_ONCE // max(1, width))
    part = made if dtype == torch.float32 else torch.empty(min(rows, of_part), width)
    for begin in range(0, max(1, rows), rows + 1 if dtype == torch.float32 else of_part):
        here = slice(begin, begin + len(part))
        native.dequantize_blocks(blocks[here], kind, part[: rows - begin])
        if dtype != torch.float32:
            made[here] = part[: rows - begin]
    return made
