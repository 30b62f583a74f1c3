"""CUDA graphs without a GPU: a recorder for `cerberus_ext.runtime` that records torch's operations on CPU tensors.

A replay does the same operations with the same numbers on the same memory: what the host put in while recording stays
what it was, and every result appears where it was while recording. Recording refuses what a stream under capture
refuses, as far as the operations tell; that all tensors are on the device is another test's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.recorder import RECORDERS
from cerberus_ext.runtime.stats import DecodeStats

# Reading a value back to the host (item and such), results whose shape depends on values, constants from host memory.
_REFUSED_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_REFUSED = {"aten::item", "aten::is_nonzero", "aten::lift_fresh", "aten::lift_fresh_copy"}


class CaptureError(RuntimeError):
    """A stream under capture could not do this."""


def check_capturable(func: Any, args: Any) -> None:
    name = func.name().split(".")[0]
    if name == "aten::index":  # by numbers; by a mask, the shape of the result depends on its values
        refused = any(index is not None and index.dtype != torch.int64 for index in args[1])
    else:
        refused = name in _REFUSED or bool(_REFUSED_TAGS.intersection(func.tags))
    if refused:
        raise CaptureError(f"operation not permitted when stream is capturing: {name}")


class Tape(TorchDispatchMode):
    """While inside, notes every operation, and does it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # made of others, which come here one by one
                return func.decompose(*args, **kwargs)
        check_capturable(func, args)
        output = func(*args, **kwargs)
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
        new = [t for t in made if t.untyped_storage().data_ptr() not in given]
        if new or not made or func._schema.is_mutable:  # else it is a view, which needs no doing
            self.operations.append((func, args, kwargs, new))
        return output

    def replay(self) -> None:
        for func, args, kwargs, new in self.operations:
            again = [t for t in tree_leaves(func(*args, **kwargs)) if isinstance(t, Tensor)]
            if new:
                for there, value in zip(new, again, strict=True):
                    there.copy_(value)


class TapeRecorder:
    """A `cerberus_ext.runtime.graphs.Recorder`. replays: how many there were."""

    def __init__(self) -> None:
        self.replays = 0
        self.tapes: list[Tape] = []

    def warm_up(self, run: Callable[[], None], last: bool) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            run()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay

    def fetch(self, source: Tensor, host: Tensor) -> None:
        host.copy_(source)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TapeRecorder]]:
    """From here on, steps on a CPU are recorded; the recorders that were made."""
    made: list[TapeRecorder] = []

    def make(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setitem(RECORDERS, "cpu", make)
    runtime._runtimes.clear()
    yield made
    runtime._runtimes.clear()


def check_replayed(replayed: DecodeStats, eager: DecodeStats) -> None:
    """They count the same steps, of which the former has replayed all, and the latter none."""
    for name in (
        "steps", "open_steps", "zero_accept_steps", "step_tokens", "accepted_histogram", "trace", "trace_proposers",
        "new_tokens",
    ):  # fmt: skip
        assert getattr(replayed, name) == getattr(eager, name), name
    assert replayed.graphed_steps == replayed.steps and replayed.fallback is None
    assert (eager.graphed_steps, eager.captures, eager.fallback) == (0, 0, None)
