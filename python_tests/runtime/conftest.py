from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tape import TapeRecorder

from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.recorder import RECORDERS


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
