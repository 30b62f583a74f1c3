"""bench/shared/step_model.py: what a step should take, from counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cerberus_ext.ops.device_step import device_block_bytes

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "shared"))

import step_model  # noqa: E402
from shapes import SHAPES, Shapes  # noqa: E402

SMALL = Shapes("small", 8, 16, 3, 2, 1, 4, 32, (10,), tied=True, num_heads=2, head_layers=1)


def test_of_numbers_small_enough_to_count() -> None:
    weights = 3 * (8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16) + 32 * 8  # query, key, value, output, MLP; LM head
    cache = 3 * 2 * 4 * 100
    plain = step_model.step_time(SMALL, 100, 1, step_model.Launches(5, 7))
    assert plain.launches == pytest.approx((3 * 5 + 7) * 2e-6)
    assert plain.memory == pytest.approx((weights + cache) * 2 / 4.3e12)
    assert plain.arithmetic == pytest.approx((2 * weights + 3 * 4 * 2 * 4 * 100) / 500e12)
    heads = 2 * 8 * 16 + 10 * 8
    tree = step_model.step_time(SMALL, 100, 4, step_model.Launches(5, 7))
    assert tree.memory - plain.memory == pytest.approx(heads * 2 / 4.3e12)
    assert tree.arithmetic == pytest.approx(4 * plain.arithmetic + 2 * heads / 500e12)


def test_weights_in_blocks_take_what_packing_gives_them() -> None:
    for bits, name in ((4, "four bits"), (5, "five bits"), (8, "bytes"), (6, "bytes of 16")):
        found = device_block_bytes(torch.empty(48, 64, dtype=torch.bfloat16), bits)
        assert found in (0, step_model.WEIGHT_BYTES[name] * 48 * 64)
    dense = step_model.step_time(SMALL, 100, 1, step_model.Launches(5, 7))
    blocks = step_model.step_time(SMALL, 100, 1, step_model.Launches(5, 7), "four bits", "bytes")
    layers = 3 * step_model.layer_weights(SMALL)
    fewer = layers * (2 - 0.75) + 32 * 8 * (2 - 1.125)
    assert dense.memory - blocks.memory == pytest.approx(fewer / 4.3e12)
    assert (dense.launches, dense.arithmetic) == (blocks.launches, blocks.arithmetic)


def test_weights_are_those_of_the_models() -> None:
    for name, parameters in (("135M", 134.5e6), ("1B", 1.236e9), ("8B", 8.03e9)):
        shapes = SHAPES[name]
        embeddings = shapes.vocab * shapes.hidden * (1 if shapes.tied else 2)
        assert shapes.layers * step_model.layer_weights(shapes) + embeddings == pytest.approx(parameters, rel=1e-3)


def test_every_shape_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    step_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 * len(step_model.WAYS) * len(step_model.CONTEXTS) * len(step_model.NODES)
    assert "8B fused, context 2048, 1 nodes: 0.720 + 3.553 + 0.032 = 4.305" in lines
