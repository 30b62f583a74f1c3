"""Lets the configs of a model name another implementation of its attention or its experts, while a step runs.

The name is global: it stands in a config object, which other threads and other models may use at the same moment. So
what it stands for asks `current_step` whether it is called from a step of its own thread, and otherwise does what the
config named before (`own`). The config has its own name back whenever no step runs: callbacks see the model as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

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


class Switch:
    """While inside, configs name `stand_in(own)` for their attribute.

    Several steps may be inside at once, of models that share a config: the first one switches it, the last one back.
    """

    def __init__(self, configs: Iterable[Any], attribute: str, stand_in: Callable[[str], str]) -> None:
        """configs: outer ones before those inside them, as setting one sets these, too."""
        self._configs = list(configs)
        self._attribute = attribute
        self._stand_in = stand_in

    def __enter__(self) -> None:
        with _lock:
            fresh = [config for config in self._configs if (id(config), self._attribute) not in _inside]
            for config in fresh:
                _inside[id(config), self._attribute] = (set(), getattr(config, self._attribute))
            for config in self._configs:
                _inside[id(config), self._attribute][0].add(self)
            for config in fresh:
                own = _inside[id(config), self._attribute][1]
                setattr(config, self._attribute, self._stand_in(own or "eager"))

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.put_back()

    def put_back(self) -> None:
        """What `__exit__` does. May be called again, or in its place: an interrupt may come on the way in or out."""
        with _lock:
            places = [(config, (id(config), self._attribute)) for config in self._configs]
            for _, place in places:
                if place in _inside:
                    _inside[place][0].discard(self)
            for config, place in places:
                if place in _inside and not _inside[place][0]:
                    setattr(config, self._attribute, _inside[place][1])
            for _, place in places:
                if place in _inside and not _inside[place][0]:
                    del _inside[place]


_lock = threading.Lock()
# Of the configs that are switched now: who is inside, own name. Not a Runtime's: models may share a config object.
_inside: dict[tuple[int, str], tuple[set[Switch], Any]] = {}
