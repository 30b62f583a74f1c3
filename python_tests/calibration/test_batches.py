"""What `calibrate` times of several texts: the steps that they take together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny_models import tiny_model

from cerberus_ext.calibration import batches
from cerberus_ext.calibration.batches import NODES, PAIR, TEXTS, measure_batches
from cerberus_ext.runtime.stepper import Chunk, step_together


def test_steps_of_several_texts_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, timed = tiny_model("llama"), Counter[tuple[int, int, int]]()

    def watch(texts: Sequence[Any], trees: Sequence[Any]) -> list[Chunk]:
        (context,) = {text.target.cache.committed for text in texts}
        timed[len(texts), sum(tree.size for tree in trees), context] += 1
        return step_together(texts, trees)

    monkeypatch.setattr(batches, "step_together", watch)
    before = model.config._attn_implementation
    found = measure_batches(model, 20, 1)
    expected = [(texts, texts) for texts in TEXTS] + [(PAIR, nodes) for nodes in NODES]
    assert timed == {(*step, 20): 12 * expected.count(step) for step in expected}
    assert tuple(found.texts) == TEXTS and tuple(found.nodes) == NODES
    for times in (found.texts, found.nodes):
        assert min(times.values()) > 0 and list(times.values()) == sorted(times.values())
    assert model.config._attn_implementation == before and not model.lm_head._forward_pre_hooks


def test_a_delay_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_step(texts: Sequence[Any], trees: Sequence[Any], context: int, device: torch.device) -> float:
        nodes = sum(tree.size for tree in trees)
        return 1.0 + nodes / 100 + (5.0 if nodes == 9 else 0.0)

    monkeypatch.setattr(batches, "_time_step", time_step)
    found = measure_batches(tiny_model("llama"), 20, 1)
    assert found.texts == {texts: 1 + texts / 100 for texts in TEXTS}
    assert found.nodes == {nodes: 1 + nodes / 100 if nodes != 9 else 1.1 for nodes in NODES}
