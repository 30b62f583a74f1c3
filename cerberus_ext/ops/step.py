"""A forward of the target model as one native call. CPU only; csrc/step/step.h describes the code."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from .native import native

_PAGE = 2 << 20  # bytes of a large page
# Bits of a weight's integer, the smallest form first: the dtype that names such memory.
BLOCKS = {4: torch.int8, 5: torch.uint16, 8: torch.int32, 6: torch.int64}


class NativeStep:
    """A step made of its code; freed with this object.

    tensors: what the code names by index: contiguous, on the CPU, float32 or of the step's dtype, or packed weights
        (one axis: uint8, those of BLOCKS, int16 for drafts). They are kept alive, and read where they lie: their values
        may change.
    code: (n,) int64.
    Raises RuntimeError where the code names what is not there, or would read or write outside of it.
    """

    recordable = False  # whether a run may be captured: its memory stays where it is

    def __init__(self, tensors: Sequence[Tensor], code: Tensor) -> None:
        self._number: int = native.make_step(list(tensors), code)
        weakref.finalize(self, native.free_step, self._number)

    def run(
        self, tokens: Tensor, positions: Tensor, length: Sequence[Tensor], ancestors: Sequence[Tensor],
        cache: Sequence[Tensor], hidden: Tensor, logits: Tensor,
    ) -> None:  # fmt: skip
        """A forward over N nodes of one or more texts, those of a text one behind the other; the weights are read once.

        tokens, positions: (N,) int64; what lies outside of a table reads its nearest row.
        Of each text, with Nt nodes: length (1,) int64, committed tokens; ancestors (Nt, W) int64, as for
        `tree_attention`; cache (C, 1, Hkv, S, E), planes of keys and values in turn, another one for each text: the
        nodes' keys and values go to slots length .. length + Nt.
        hidden (N, D), logits (R, V): the results, of the cache's dtype; logits of the last R nodes.
        Raises RuntimeError on other shapes or dtypes, on a non-contiguous tensor.
        """
        native.run_step(self._number, tokens, positions, list(length), list(ancestors), list(cache), hidden, logits)

    def times(self, on: bool) -> list[int]:
        """Nanoseconds of each stage since they were last asked for; on: whether to measure from now on."""
        return list(native.step_times(self._number, on))


def settle(
    draft: Tensor, target: Tensor, parents: Tensor, ancestors: Sequence[Tensor], cache: Sequence[Tensor],
    length: Sequence[Tensor], hidden: Tensor, state: Sequence[Tensor], pending: Sequence[Tensor], path: Tensor,
) -> None:  # fmt: skip
    """`verify_tree` and `commit_cache` of one or more texts on a CPU, and what their next steps begin with, in one
    call.

    draft, target, parents: (N,) int64, hidden: (N, D), of all texts' nodes, those of a text one behind the other; a
        parent is counted from the text's first node.
    Of each text, with Nt nodes: ancestors (Nt, W), cache (C, 1, Hkv, S, E), length (1,), as there; depth is Nt - 1.
    Written: caches and lengths; path (N,) int64, of each text the accepted nodes, then -1; state (1, D) and pending
        (1,) int64 of each text, hidden and target of the last of them.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    native.settle(
        draft, target, parents, list(ancestors), list(cache), list(length), hidden, list(state), list(pending), path
    )


def packed_bytes(weight: Tensor, rows: int) -> int:
    """Of so many packed rows like those of weight (O, I), float32 | bfloat16 | float16; 0: this processor reads such
    weights as they are.

    Raises RuntimeError on another rank or dtype, on a non-contiguous tensor, on rows beyond 2^32.
    """
    return int(native.packed_bytes(weight, rows))


def pack_weights(weights: Sequence[Tensor], packed: Tensor) -> None:
    """Copies weights (O_i, I) of one dtype, contiguous, one behind the other, to where a step reads them fastest.

    packed: uint8, at least packed_bytes(weights[0], sum of O_i) elements.
    Raises RuntimeError on other shapes or dtypes, or where packed_bytes is 0.
    """
    native.pack_weights(list(weights), packed)


def block_bytes(weight: Tensor, rows: int, bits: int) -> int:
    """Of so many rows like those of weight (O, I) in blocks of so many bits a weight, those of BLOCKS; 0: this
    processor, dtype or size has no such form.

    Raises RuntimeError as `packed_bytes`, and on other bits.
    """
    return int(native.block_bytes(weight, rows, bits))


def pack_blocks(weights: Sequence[Tensor], packed: Tensor) -> bool:
    """As `pack_weights`, in fewer bits, where every 32 weights of a row came out of a file's block of them, rounded.

    weights: bfloat16, I a multiple of 32. In 4 bits: d q + m with q from 0 to 15, as in ggml's Q4_1, Q4_0 and Q4_K,
        where d and m are float32 numbers that can be told from the weights: not always where these lie far from 0
        beside their steps. In 5 bits: the same with q from 0 to 31, as in Q5_1, Q5_0 and Q5_K. In 8 bits: d q with q
        from -127 to 127, one of them reached, and d a float16 number, as in Q8_0. In 6 bits: d q with q from -32 to 32
        and any d, one for every 16, as in Q6_K; a byte each.
    packed: of the dtype in BLOCKS that names the bits, at least block_bytes(weights[0], sum of O_i, bits) bytes.
    Returns whether all weights can be given so to the bit; if not, `packed` is of no use.
    Raises RuntimeError on other shapes or dtypes, or where block_bytes is 0.
    """
    return bool(native.pack_blocks(list(weights), packed))


def prefer_large_pages(memory: Tensor) -> None:
    """Moves a tensor on a CPU to pages of 2 MiB, where the system has them; it lies where it lay.

    Raises RuntimeError on a non-contiguous tensor, or one on another device.
    """
    native.prefer_large_pages(memory)


def release_mapped(memory: Tensor) -> int:
    """Gives the system back the pages of a tensor that lie in a file, unchanged: they are read from there again, to the
    bit, when somebody asks. What was written to, and what is mapped from no file, stays.

    memory: on the CPU, contiguous; nobody may write to it meanwhile. Returns the bytes that were given back, on Linux;
    elsewhere 0. Raises RuntimeError on a non-contiguous tensor, or one on another device.
    """
    return int(native.release_mapped(memory))


def trim_heap() -> None:
    """Gives the system back what the process has freed and glibc keeps for later; it takes milliseconds."""
    native.trim_heap()


def large_memory(size: int) -> Tensor:
    """size bytes, uint8, on pages of 2 MiB where the system has them: a step reads all of its weights through them."""
    memory = torch.empty(size + _PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % _PAGE
    memory = memory[begin : begin + size]
    prefer_large_pages(memory)
    return memory
