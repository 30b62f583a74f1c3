"""Fused steps of models from files of fewer bits, as launches of the CUDA kernels under emulation: with weights in
blocks they have the bits of the dense ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_paths import path_to
from block_weights import q6_k
from device_steps import device, launches
from fused_steps import every_call_seen
from gguf import GGMLQuantizationType
from op_cases import assert_same_bits
from tape import TapeRecorder, recorders
from tiny_families import tiny_family
from tiny_gguf import FIVES, MIXED, tiny_gguf
from torch import Tensor

import cerberus_ext
from cerberus_ext.drafting.tree import ALONE, tree_of_ranks
from cerberus_ext.ops.device_step import device_block_bytes
from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.fused.step import FusedStep

BUSH = tree_of_ranks([-1, 0, 0, 1, 1, 2, 3, 6, 0, 8, 5], [0] * 11)
__all__ = ["device", "recorders"]
pytestmark = [
    pytest.mark.usefixtures("simt", "own_cache"),
    pytest.mark.skipif(
        not device_block_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 4), reason="packing needs AVX-512"
    ),
]


def model_of(folder: Path, kinds: dict[str, GGMLQuantizationType]) -> Any:
    tiny_gguf(folder / "tiny.gguf", 64, kinds)
    return cerberus_ext.load_gguf(folder / "tiny.gguf", dtype=torch.bfloat16, device="cpu")[0]


def step(model: Any, pack: bool) -> tuple[list[Tensor], dict[str, int], int]:
    """Results of a tree and of a path of it token by token; of how many products the weights are in blocks; and how
    many launches the tree was."""
    ids = torch.arange(5)[None] + 40
    tokens = torch.arange(BUSH.size) * 7 % 90 + 30
    with torch.inference_mode(), every_call_seen(model, capacity=64) as target:
        target.prefill(ids)
        target.fused = fused = FusedStep(target, pack=pack)
        before = launches()
        found = [each.clone() for each in target.step(tokens[None], BUSH.on(torch.device("cpu")))]
        count = launches() - before
        for node in path_to(BUSH.parents.tolist(), 7):
            alone = target.step(tokens[None, node : node + 1], ALONE.on(torch.device("cpu")))
            target.cache.extend(1)
            assert_same_bits(alone[1][0, 0], found[1][0, node])
        assert target.cache.tensor is not None
        return [*found, target.cache.tensor.clone()], fused.packed, count


@pytest.mark.parametrize(
    ("kinds", "packed", "more"),
    [
        (MIXED, {"four": 7, "eight": 1}, 0),
        (FIVES, {"five": 7, "eight": 1}, 1),  # queries and keys are another launch than values
    ],
)
def test_has_the_bits_of_the_dense_step(
    kinds: dict[str, GGMLQuantizationType], packed: dict[str, int], more: int, tmp_path: Path, device: None
) -> None:
    check_bits(model_of(tmp_path, kinds), packed, more)


def check_bits(model: Any, packed: dict[str, int], more: int) -> None:
    dense, none, few = step(model, pack=False)
    blocks, found, count = step(model, pack=True)
    for got, want in zip(blocks, dense, strict=True):
        assert_same_bits(got, want)
    assert not none and found == {f"packed in {bits} bits": number for bits, number in packed.items()}
    assert count == few + more


def test_formats_of_one_input_may_differ(tmp_path: Path, device: None) -> None:
    """Values in six bits; and gates of none: two launches more."""
    model = model_of(tmp_path, MIXED)
    layer = model.model.layers[0]
    layer.self_attn.v_proj.weight.data.copy_(q6_k(*layer.self_attn.v_proj.weight.shape, scale=0.3))
    layer.mlp.gate_proj.weight.data.normal_(0, 0.3)
    check_bits(model, {"four": 5, "eight": 2}, 2)


def test_decodes_with_recorded_steps(tmp_path: Path, device: None, recorders: list[TapeRecorder]) -> None:
    """The text of the dense steps; `explain` names what the weights are in."""
    model = model_of(tmp_path, MIXED)
    ids = torch.arange(6)[None] + 40
    texts = []
    for pack in (False, None):
        out = cerberus_ext.decode(model, None, ids, max_new_tokens=10, graphs=True, pack=pack)
        assert out.stats.fused and out.stats.graphed_steps == out.stats.steps and out.stats.exact
        texts.append(out.sequences)
    assert texts[0].equal(texts[1])
    runtime._runtimes.clear()
    program = cerberus_ext.Decoder(model).explain(2)
    assert "weights: 7 packed in four bits, 1 packed in eight bits;" in program and "self_attn.k_proj" in program


def test_weights_that_change_are_packed_again(tmp_path: Path, device: None, recorders: list[TapeRecorder]) -> None:
    """Or left, where the new ones are none of a file."""
    model = model_of(tmp_path, MIXED)
    ids = torch.arange(6)[None] + 40
    options: dict[str, Any] = {"max_new_tokens": 4, "graphs": True}
    cerberus_ext.decode(model, None, ids, **options)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.normal_()
        model.model.layers[0].mlp.down_proj.weight.neg_()
    changed = cerberus_ext.decode(model, None, ids, **options)
    assert changed.stats.captures > 0
    dense = cerberus_ext.decode(model, None, ids, pack=False, **options)
    assert changed.sequences.equal(dense.sequences)


def test_weights_at_no_multiple_of_16_bytes_stay_as_they_are(tmp_path: Path, device: None) -> None:
    """Their products have other bits."""
    model = model_of(tmp_path, MIXED)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = torch.empty(weight.numel() + 4, dtype=weight.dtype)[4:].view(weight.shape).copy_(weight.data)
    check_bits(model, {}, 0)


def test_what_is_none_of_a_file_stays_as_it_is(device: None) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert not step(tiny_family("llama", dtype), pack=True)[1]
