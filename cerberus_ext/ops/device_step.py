"""A forward of the target model as launches on a GPU, without Python between them; csrc/step/device_step.h."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .native import native


class DeviceStep:
    """As NativeStep, for tensors on one CUDA device; what a run reads and writes is planned once and stays there.

    tensors: contiguous, float32 or of the step's dtype, or weights that pack_device_blocks has packed. They are kept
        alive, and read where they lie.
    code: (n,) int64, on the CPU.
    Raises RuntimeError where the code names what is not there, would read or write outside of it, or asks for what
    the kernels do not do.
    """

    recordable = True

    def __init__(self, tensors: Sequence[Tensor], code: Tensor, library: Any = native) -> None:
        """library: whose ops these are; a test has others."""
        if not hasattr(library, "make_device_step"):
            raise RuntimeError("cerberus_ext has no CUDA kernels in this installation")
        self._tensors, self._code, self._library = list(tensors), code, library
        self._cache: tuple[int, ...] | None = None
        self._make()

    def _make(self) -> None:
        self._number: int = self._library.make_device_step(self._tensors, self._code)
        self._free = weakref.finalize(self, self._library.free_device_step, self._number)
        self.launches: dict[tuple[int, ...], int] = {}  # of a run, by what was planned: N, and where the results go

    def run(
        self, tokens: Tensor, positions: Tensor, length: Sequence[Tensor], ancestors: Sequence[Tensor],
        cache: Sequence[Tensor], hidden: Tensor, logits: Tensor,
    ) -> None:  # fmt: skip
        """As NativeStep.run, on the device, of one text, with logits (N, V) of all nodes.

        The first run with this cache, hidden and logits allocates and copies; every later one does neither, and may be
        captured. The plans are kept, with memory of their own, until a run with another cache: what was captured is of
        no use then.
        """
        if len(cache) != 1 or len(length) != 1 or len(ancestors) != 1:
            raise RuntimeError(f"run_device_step: cache must be that of one text, got {len(cache)}")
        of_cache = (cache[0].data_ptr(), cache[0].shape[3])
        if of_cache != self._cache and self.launches:
            self._free()
            self._make()
        self._cache = of_cache
        key = (len(tokens), hidden.data_ptr(), logits.data_ptr())
        if key not in self.launches:
            self.launches[key] = self._library.plan_device_step(self._number, cache[0], hidden, logits)
        of_text = (length[0], ancestors[0], cache[0])
        self._library.run_device_step(self._number, tokens, positions, *of_text, hidden, logits)

    def times(self, on: bool) -> list[int]:
        """None are taken on a device."""
        return []


def device_block_bytes(weight: Tensor, bits: int) -> int:
    """Of weight (O, I), on any device, in blocks of so many bits as a GPU reads them; 0: there are none of that dtype
    or I, or this processor cannot pack them: it has no AVX-512.

    Raises RuntimeError on another rank or dtype than float32 | bfloat16 | float16, on a non-contiguous tensor, on other
    bits than those of `ops.step.BLOCKS`.
    """
    return int(native.device_block_bytes(weight, bits))


def pack_device_blocks(weight: Tensor, packed: Tensor) -> bool:
    """As `ops.step.pack_blocks`, of one weight, for the kernels of a DeviceStep; both tensors are on the CPU.

    packed: zeros, of the dtype in BLOCKS that names the bits, at least device_block_bytes(weight, bits) bytes.
    Returns whether all weights can be given so to the bit, but for the sign of a zero; if not, `packed` is of no use.
    Raises RuntimeError on other shapes or dtypes, or where device_block_bytes is 0.
    """
    return bool(native.pack_device_blocks(weight, packed))
