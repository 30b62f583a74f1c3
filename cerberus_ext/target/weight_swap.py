"""Puts other tensors in the place of a model's weights while a step runs, also where several steps run at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import Tensor, nn


class WeightSwap:
    """While inside, the model's modules have `weights` in the place of their own.

    Threads may be inside at once, with one model or with models that share modules: the last one puts the
    module's own back. `torch.func.functional_call` would put back what another thread put there.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """weights: by the name of a parameter; they share the memory of those that they replace."""
        self._places = []
        for path, weight in weights.items():
            prefix, _, name = path.rpartition(".")
            module = model.get_submodule(prefix)
            self._places.append(((id(module), name), module._parameters, weight))
        self._entered = 0

    def __enter__(self) -> None:
        self._entered = 0
        try:
            with _lock:
                for key, parameters, weight in self._places:
                    if key not in _inside:
                        _inside[key] = [0, parameters[key[1]]]
                    _inside[key][0] += 1
                    self._entered += 1
                    parameters[key[1]] = weight  # type: ignore[assignment]  # no nn.Parameter
        except BaseException:  # an interrupt
            self._put_back()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._put_back()

    def _put_back(self) -> None:
        with _lock:
            for key, parameters, _ in self._places[: self._entered]:
                _inside[key][0] -= 1
                if _inside[key][0] == 0:
                    parameters[key[1]] = _inside.pop(key)[1]


_lock = threading.Lock()
# Of the weights that are replaced now: steps inside, the module's own. Not a Runtime's: models may share modules.
_inside: dict[tuple[int, str], list[Any]] = {}
