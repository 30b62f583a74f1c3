"""Drafting on a CPU by weights in eight bits: reading the weights is what drafting costs, and what is drafted wrong is
not taken, so that a text's tokens do not depend on it.

Of every row of a weight w the integers q from -127 to 127 and one d are kept, w = d q nearly; rows that are multiplied
with it are rounded to integers of 16 bits or less, and what is summed is exact (csrc/cpu/eight_bits.h).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .native import native
from .step import large_memory


def in_eight_bits(weight: Tensor) -> Tensor:
    """weight (..., O, I) float32 | bfloat16 | float16, on the CPU -> the (O, I) in it one behind the other, packed.

    Returns int16 (n,), for `draft` or for a step; a processor's kernels share the form. A row with a number that is not
    finite gives NaN in every product.
    """
    blocks = weight.flatten(0, -3) if weight.dim() > 2 else weight[None]
    size: int = native.eight_bit_bytes(*blocks.shape[1:])
    packed = large_memory(len(blocks) * size).view(torch.int16)
    for block, part in zip(blocks, packed.view(len(blocks), -1), strict=True):
        native.pack_eight_bits(block.contiguous(), part)
    return packed


def eight_bit_linear(input: Tensor, weight: Tensor, outputs: int) -> Tensor:
    """input (M, I) @ w^T, w (O, I) = weight, packed by `in_eight_bits`; outputs: O. Rows do not depend on each other.

    input: float32 | bfloat16 | float16, contiguous, on the CPU. Returns (M, O) of its dtype.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    output = input.new_empty(len(input), outputs)
    native.eight_bit_linear(input, weight, output)
    return output


def draft(
    hidden: Tensor, pending: Tensor, embeddings: Tensor, anchor_scale: Tensor | None, stack: Tensor, bias: Tensor,
    projection: Tensor, vocab: int, vocabulary: Tensor | None, drafts: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`head_stack` and `draft_topk` in one call. All floating-point tensors are of one dtype, and all on the CPU.

    hidden: (B, D) float32 | bfloat16 | float16, contiguous, D >= 1. pending: (B,) int64.
    embeddings: (V, D), of whose row `pending` the anchor is anchor_scale () times; None: the anchor is hidden.
    stack: int16, in_eight_bits of (L, K, D, 2D) or (L, K, D, D). bias: (L, K, D).
    projection: int16, in_eight_bits of (Vd, D); vocab: Vd.
    vocabulary: (Vd,) int64, the tokens of the projection's rows; None: 0, 1 ...
    drafts: P, 1 <= P <= min(32, Vd).
    Returns ids (B, K, P) int64, best first, -1 where the probability is 0 or no number; logprobs (B, K, P) float32.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    shape = (len(hidden), bias.shape[1], drafts)
    ids, logprobs = torch.empty(shape, dtype=torch.int64), torch.empty(shape)
    native.draft(hidden, pending, embeddings, anchor_scale, stack, bias, projection, vocab, vocabulary, ids, logprobs)
    return ids, logprobs
