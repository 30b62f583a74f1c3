"""Steps as launches of the emulated CUDA kernels, on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from step_codes import NONE, row
from torch import Tensor

from cerberus_ext.ops.device_step import DeviceStep
from cerberus_ext.ops.step import NativeStep
from cerberus_ext.runtime.fused.step import NATIVE

PACKING = {torch.int8: 2, torch.int32: 4, torch.int64: 5, torch.uint16: 6}


class EmulatedStep(DeviceStep):
    """In the place of NativeStep, once the emulation is loaded."""

    def __init__(self, tensors: Sequence[Tensor], code: Tensor) -> None:
        super().__init__(tensors, code, torch.ops.cerberus_simt)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, fused steps on a CPU are launches of emulated kernels."""
    monkeypatch.setitem(NATIVE, "cpu", EmulatedStep)


def launches() -> int:
    """How many there were so far."""
    return int(torch.ops.cerberus_simt.launches())


def run(
    step: NativeStep | EmulatedStep,
    tokens: Tensor,
    dtype: torch.dtype,
    sizes: tuple[int, int],
    length: int = 3,
    heads: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """sizes: of hidden states and logits -> these, and the cache."""
    nodes = len(tokens)
    hidden, logits = (torch.full((nodes, size), torch.nan, dtype=dtype) for size in sizes)
    ancestors, cache = (
        torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64),
        torch.zeros(2, 1, heads, 8, 4, dtype=dtype),
    )
    step.run(tokens, torch.arange(nodes), [torch.tensor([length])], [ancestors], [cache], hidden, logits)
    return hidden, logits, cache


def product(weights: Sequence[Tensor], sizes: Sequence[int], states: Tensor, tokens: Tensor) -> Tensor:
    """(N, sum of sizes): the parts of one product of the tokens' states (V, I), with a bias for every other one.

    weights: bfloat16 (O, I), or in blocks of a GPU.
    """
    width, out = states.shape[1], sum(sizes)
    generator = torch.Generator().manual_seed(1)
    biases = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    code = [1, 1, 1, 1, 4, 2, 1 + len(sizes), 0, 1, width, 0, out, 0, 1, 0, 1, 0, 0, 1, 1, width]
    code += [*row(2, 0), *row(5, 0), *NONE]
    tensors, first = [states], 0
    for place, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        tensors += [weight, biases[place]]
        bias = 2 + 2 * place if place % 2 == 0 else -1
        code += [4, 0, 1, 1 + 2 * place, width, size, bias, PACKING.get(weight.dtype, 0), first]
        first += size
    return run(EmulatedStep(tensors, torch.tensor(code)), tokens, torch.bfloat16, (width, out))[1]
