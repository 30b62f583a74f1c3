"""What torch.compile has made of a model, left out for the time of a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch


class _Step:
    """One that is inside. It is gone with its frame, whatever has ended that: an interrupt leaves nothing behind."""


_inside: WeakSet[_Step] = WeakSet()  # of all threads
_stance: Any = None  # while there are any


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """While inside, compiled modules run as they were written, on a CPU.

    They would be compiled again and again: for every number of nodes, with every attention, within the modes that
    trace and read a step; and what is compiled sums in an order of its own. On other devices steps are recorded with
    what the compiler has made. torch has one switch for all threads. No lock: an interrupt may come where it is held.
    """
    global _stance
    if device.type != "cpu" or "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    step = _Step()
    _inside.add(step)
    try:
        if _stance is None:
            _stance = torch.compiler.set_stance("force_eager")
        yield
    finally:
        _inside.discard(step)
        if not _inside and (stance := _stance) is not None:
            _stance = None
            stance.__exit__(None, None, None)
