"""Weights as they come out of a file of fewer bits, in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def q4_1(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """As ggml makes them: the least of 32 weights is m, the largest 15 d + m, both d and m float16."""
    generator = torch.Generator().manual_seed(seed)
    blocks = scale * torch.randn(out_size, size // 32, 32, generator=generator)
    least, largest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    d = ((largest - least) / 15).half().float()
    q = ((blocks - least) / d.clamp(min=1e-30)).round().clamp(0, 15)
    return (q * d + least.half().float()).view(out_size, size).bfloat16()


def q4_0(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """The one of the largest magnitude is -8 d."""
    generator = torch.Generator().manual_seed(seed)
    blocks = scale * torch.randn(out_size, size // 32, 32, generator=generator)
    furthest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    d = (furthest / -8).half().float()
    q = (blocks / d).round().clamp(-8, 7) + 0.0  # an integer: its zero has no sign
    return (q * d).view(out_size, size).bfloat16()


def q8_0(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """The largest magnitude of 32 weights is 127 d."""
    generator = torch.Generator().manual_seed(seed)
    blocks = scale * torch.randn(out_size, size // 32, 32, generator=generator)
    d = blocks.abs().amax(-1, keepdim=True) / 127
    q = (blocks / d).round() + 0.0
    return (q * d.half().float()).view(out_size, size).bfloat16()
