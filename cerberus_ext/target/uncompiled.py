"""What torch.compile has made of a model, left out for the time of a step."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0  # steps, of all threads
_stance: Any = None  # while there are any


@contextmanager
def uncompiled(device: torch.device) -> Iterator[None]:
    """While inside, compiled modules run as they were written, on a CPU.

    They would be compiled again and again: for every number of nodes, with every attention, within the modes that
    trace and read a step; and what is compiled sums in an order of its own. On other devices steps are recorded with
    what the compiler has made. torch has one switch for all threads.
    """
    global _inside, _stance
    if device.type != "cpu" or "torch._dynamo" not in sys.modules:  # nothing is compiled
        yield
        return
    with _lock:
        _inside += 1
        if _inside == 1:
            _stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _stance.__exit__(None, None, None)
