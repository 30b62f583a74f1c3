"""Steps as launches of the emulated CUDA kernels, on CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cerberus_ext.ops.device_step import DeviceStep


class EmulatedStep(DeviceStep):
    """In the place of NativeStep, once the emulation is loaded."""

    def __init__(self, tensors: Sequence[Tensor], code: Tensor) -> None:
        super().__init__(tensors, code, torch.ops.cerberus_simt)


def launches() -> int:
    """How many there were so far."""
    return int(torch.ops.cerberus_simt.launches())
