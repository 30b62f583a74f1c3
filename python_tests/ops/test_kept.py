"""A call keeps no memory of its own: a server makes hundreds of them for every answer."""

from __future__ import annotations

import ctypes

import pytest
import torch
from op_cases import EXAMPLES, example

from cerberus_ext import ops

CALLS = 1000


class InUse(ctypes.Structure):
    """What glibc's allocator says of itself; bytes: that are given out, of all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in (*"abcdefg", "bytes", "free", "top")]


@pytest.mark.parametrize(
    "op", [op for op in EXAMPLES if not getattr(torch.ops.cerberus_ext, op).default._schema.is_mutable]
)
def test_nothing_is_kept(op: str) -> None:
    in_use = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if in_use is None:
        pytest.skip("needs mallinfo2, of glibc 2.33")
    in_use.restype = InUse
    call, arguments = getattr(ops, op), example(op)

    def kept() -> int:
        before = in_use().bytes
        for _ in range(CALLS):
            call(**arguments)
        return int(in_use().bytes - before)

    kept()  # what the first calls make for all others
    assert min(kept() for _ in range(3)) < 8 * CALLS
