"""Weights that came out of a file of fewer bits, as a GPU's kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from ...ops.device_step import device_block_bytes, pack_device_blocks
from ...ops.step import BLOCKS

_SAMPLED_ROWS = 8


def in_blocks(weight: Tensor) -> Tensor | None:
    """A copy in blocks on the weight's device, as its dtype says; None: it cannot be given so to the bit, or the
    processor that packs has no AVX-512. Found from the values, on the host."""
    if weight.dim() != 2 or weight.dtype != torch.bfloat16 or not device_block_bytes(weight, 4):
        return None
    sample, whole = weight[:_SAMPLED_ROWS].cpu(), None
    for bits, dtype in BLOCKS.items():
        if _packed(sample, bits, dtype) is None:
            continue
        whole = weight.cpu() if whole is None else whole
        if (packed := _packed(whole, bits, dtype)) is not None:
            return packed.to(weight.device)
    return None


def _packed(weight: Tensor, bits: int, dtype: torch.dtype) -> Tensor | None:
    packed = torch.zeros(device_block_bytes(weight, bits), dtype=torch.uint8).view(dtype)
    return packed if pack_device_blocks(weight, packed) else None
