"""Weights as they come out of a file of fewer bits, in bfloat16; packed in those again, and multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from cerberus_ext.ops.step import BLOCKS, NativeStep, block_bytes, pack_blocks


def _blocks(out_size: int, size: int, scale: float, seed: int) -> Tensor:
    """(out_size, size / 32, 32), normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(out_size, size // 32, 32, generator=generator)


def q4_1(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """As ggml makes them: the least of 32 weights is m, the largest 15 d + m, both d and m float16."""
    return _from_least(_blocks(out_size, size, scale, seed), 15)


def q5_1(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """31 d + m."""
    return _from_least(_blocks(out_size, size, scale, seed), 31)


def _from_least(blocks: Tensor, most: int) -> Tensor:
    least, largest = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    d = ((largest - least) / most).half().float()
    q = ((blocks - least) / d.clamp(min=1e-30)).round().clamp(0, most)
    return (q * d + least.half().float()).flatten(1).bfloat16()


def q4_0(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """The one of the largest magnitude is -8 d."""
    return _from_middle(_blocks(out_size, size, scale, seed), 8)


def q5_0(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """-16 d."""
    return _from_middle(_blocks(out_size, size, scale, seed), 16)


def _from_middle(blocks: Tensor, most: int) -> Tensor:
    d = (_furthest(blocks) / -most).half().float()
    q = (blocks / d).round().clamp(-most, most - 1) + 0.0  # an integer: its zero has no sign
    return (q * d).flatten(1).bfloat16()


def _furthest(blocks: Tensor) -> Tensor:
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def q6_k(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """-32 d for every 16, where the d of a row are integers times one of its numbers."""
    blocks = _blocks(out_size, size, scale, seed).view(out_size, -1, 16)
    d = _furthest(blocks) / -32
    unit = (d.abs().amax((1, 2), keepdim=True) / 127).half().float().clamp(min=2**-24)
    d = (d / unit).round() * unit
    q = (blocks / d).round().clamp(-32, 31) + 0.0  # where d is 0, either of them
    return (q * d).flatten(1).bfloat16()


def q8_0(out_size: int, size: int, scale: float = 0.05, seed: int = 0) -> Tensor:
    """The largest magnitude of 32 weights is 127 d."""
    blocks = _blocks(out_size, size, scale, seed)
    d = blocks.abs().amax(-1, keepdim=True) / 127
    q = (blocks / d).round() + 0.0
    return (q * d.half().float()).view(out_size, size).bfloat16()


def cancelling(*weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """States (11, I), and the weights, whose products begin and end with large terms of opposite signs: what is added
    between them depends on the order. I is a multiple of 32 above it."""
    size = weights[0].shape[1]
    states = torch.randn(11, size, generator=torch.Generator().manual_seed(1)).bfloat16()
    states[:, :32] *= 1 << 14
    states[:, -32:] = -states[:, :32]
    return states, [torch.cat([weight[:, :-32], weight[:, :32]], 1) for weight in weights]


def packed_in(bits: int, *weights: Tensor) -> Tensor | None:
    """The weights in so many bits, one behind the other; None where they cannot be given so."""
    size = block_bytes(weights[0], sum(map(len, weights)), bits)
    memory = torch.full((size,), 85, dtype=torch.int8).view(BLOCKS[bits])
    return memory if pack_blocks(weights, memory) else None


def multiply(weights: Tensor, shape: torch.Size, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (N, I) @ the packed weights (O, I)^T, by a step whose embeddings are x."""
    nodes, (out_size, size) = len(x), shape
    tensors = [x, weights] if bias is None else [x, weights, bias]
    packing = {torch.int8: 2, torch.int32: 4, torch.int64: 5, torch.uint16: 6}.get(weights.dtype, 0)
    code = [1, 1, 1, 1, 4, 2, 2, 0, 1, size, 0, out_size, 0]
    code += [1, 0, 1, 0, 0, 1, 1, size, 2, 0, 0, 0, 0, 1, 5, 0, 0, 0, 0, 1, *[0] * 6]
    code += [0, 0, 1, 1, size, out_size, -1 if bias is None else 2, packing]
    step = NativeStep(tensors, torch.tensor(code))
    hidden, logits = torch.empty_like(x), torch.empty(nodes, out_size, dtype=x.dtype)
    ancestors, index = torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64), torch.arange(nodes)
    step.run(
        index, index, [torch.tensor([0])], [ancestors], [torch.zeros(2, 1, 1, 8, 4, dtype=x.dtype)], hidden, logits
    )
    return logits
