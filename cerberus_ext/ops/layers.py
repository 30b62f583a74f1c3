"""What a target model computes, row-invariantly. CPU only: there, torch's own ops are not."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import fake, native


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """input @ weight^T + bias, every output summed in one fixed order: a row never depends on the others.

    CPU only.

    input: (M, I) float32 | bfloat16 | float16, contiguous.
    weight: (O, I); transposed: (I, O), GPT-2's Conv1D.
    bias: (O,) or None.
    Returns (M, O) of input's dtype, rounded from a float32 sum. At the levels avx512_bf16 and amx_bf16 bfloat16
        numbers below 2^-126 count as zeros.
    Raises RuntimeError on other shapes or dtypes, on a non-contiguous tensor.
    """
    return native.linear(input, weight, bias, transposed)


@fake(linear, "input MI, weight OI, bias? O")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[1 if transposed else 0])


def grouped_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, transposed: bool = False
) -> Tensor:
    """`linear` of rows that name their weights: the experts of a mixture model. A weight is read once for all rows.

    Each result has the bits that `linear` gives it with its group's weight. CPU only.

    input: (M, J, I) float32 | bfloat16 | float16, contiguous; or (M, 1, I): one row for all that it names.
    weight: (G, O, I); transposed: (G, I, O).
    bias: (G, O) or None.
    chosen: (M, J) int64: the groups of every row; where it is none of 0 .. G - 1, the result is 0.
    Returns (M, J, O) of input's dtype.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    return native.grouped_linear(input, weight, bias, chosen, transposed)


@fake(grouped_linear, "input MJI, weight GOI, bias? GO, chosen MJ")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, transposed: bool) -> Tensor:
    return input.new_empty(*chosen.shape, weight.shape[2 if transposed else 1])


def activation(input: Tensor, kind: str) -> Tensor:
    """kind(input), element by element: an element's bits depend on its value alone.

    CPU only. torch's own kernels compute the last elements of a thread's share by other code than the rest, which may
    differ in the last bit: there, what a token becomes can depend on how many tokens are in the call.

    input: float32 | bfloat16 | float16 of any shape, contiguous.
    kind: silu, gelu, gelu_tanh, tanh, sigmoid, exp, erf, softplus, cos or sin.
    Returns input's shape and dtype, within 1 ulp of float32 before it is rounded to the dtype.
    Raises RuntimeError on another dtype or kind, on a non-contiguous tensor.
    """
    return native.activation(input, kind)


@fake(activation)
def _(input: Tensor, kind: str) -> Tensor:
    return torch.empty_like(input)
