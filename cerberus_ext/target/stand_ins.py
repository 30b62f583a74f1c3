"""Lets the configs of a model name another implementation of its attention or its experts, while a step runs.

The name is global: it stands in a config object, which other threads and other models may use at the same moment. So
what it stands for asks `current_step` whether it is called from a step of its own thread, and otherwise does what the
config named before (`own`). The config has its own name back whenever no step runs: callbacks see the model as it was.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import TracebackType

from torch import Tensor


@dataclass
class TreeStep:
    """One forward over a tree.

    length (B,) int64: committed tokens. ancestors (N, W) int64, see TreeTensors. windows: sliding window of every
    layer, 0: none. mask: what the model gets for an attention mask, None: nothing. planes: by address, the layer whose
    keys lie there. attended: how many layers have attended so far.
    """

    length: Tensor
    ancestors: Tensor
    windows: tuple[int, ...]
    mask: Tensor | None = None
    planes: dict[int, int] = field(default_factory=dict)
    attended: int = 0


class _Thread(threading.local):
    step: TreeStep | None = None


_thread = _Thread()


def current_step() -> TreeStep | None:
    """The step that this thread runs."""
    return _thread.step


class running:
    """While inside, `step` is this thread's. A hook of the model may decode another model inside."""

    def __init__(self, step: TreeStep) -> None:
        self._step = step

    def __enter__(self) -> TreeStep:
        self._before, _thread.step = _thread.step, self._step
        return self._step

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _thread.step = self._before
