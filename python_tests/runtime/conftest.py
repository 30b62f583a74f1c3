from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tape import TapeRecorder

from cerberus_ext.runtime import graphs


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TapeRecorder]]:
    """From here on, steps on a CPU are recorded; the recorders that were made."""
    made: list[TapeRecorder] = []

    def make(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder())
        return made[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", make)
    graphs._kept.clear()
    yield made
    graphs._kept.clear()
