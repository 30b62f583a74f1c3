"""Steps as launches of the emulated CUDA kernels, on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from cerberus_ext.ops.device_step import DeviceStep
from cerberus_ext.ops.step import NativeStep
from cerberus_ext.runtime.fused.step import NATIVE


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
