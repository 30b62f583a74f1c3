"""Puts other values in the place of a model's own while a step runs, also where several steps run at once."""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn


class Swap:
    """While inside, every place has another value: a module another weight, a config another name.

    Threads may be inside at once, with one model or with models that share modules or configs: the first one puts the
    other value there, the last one the own. `torch.func.functional_call` would put back what another thread put there.
    """

    def __init__(
        self,
        places: Iterable[tuple[Any, str, Callable[[Any], Any]]],
        read: Callable[[Any, str], Any],
        write: Callable[[Any, str, Any], None],
    ) -> None:
        """places: owner, name, and what makes the other value of the own one; where writing one place writes others,
        too, it comes before them. read, write: of an owner and a name."""
        self._places = [((id(owner), name), owner, name, other) for owner, name, other in places]
        self._read, self._write = read, write

    def __enter__(self) -> None:
        try:
            with _lock:
                fresh = []
                for key, owner, name, other in self._places:
                    if key not in _inside:
                        _inside[key] = (set(), self._read(owner, name))
                        fresh.append((owner, name, other(_inside[key][1])))
                    _inside[key][0].add(self)
                for place in fresh:
                    self._write(*place)
        except BaseException:  # an interrupt
            self.put_back()
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.put_back()

    def put_back(self) -> None:
        """What `__exit__` does. May be called again, or in its place: an interrupt may come on the way in or out."""
        with _lock:
            for key, owner, name, _ in self._places:
                if key in _inside:
                    inside, own = _inside[key]
                    inside.discard(self)
                    if not inside:
                        self._write(owner, name, own)
                        del _inside[key]


def weight_swap(model: nn.Module, weights: Mapping[str, Tensor]) -> Swap:
    """weights: by the name of a parameter of the model; they share the memory of those that they replace."""
    places = []
    for path, weight in weights.items():
        prefix, _, name = path.rpartition(".")
        places.append((model.get_submodule(prefix)._parameters, name, partial(_always, weight)))
    return Swap(places, operator.getitem, operator.setitem)


def config_swap(configs: Iterable[Any], attribute: str, stand_in: Callable[[str], str]) -> Swap:
    """Configs name `stand_in(own)` for their attribute. configs: outer ones before those inside them."""
    places = [(config, attribute, lambda own: stand_in(own or "eager")) for config in configs]
    return Swap(places, getattr, setattr)


def _always(value: Any, own: Any) -> Any:
    return value


_lock = threading.Lock()
# Of the places that have another value now: who is inside, own value. Not a Runtime's: models may share the owners.
_inside: dict[tuple[int, str], tuple[set[Swap], Any]] = {}
