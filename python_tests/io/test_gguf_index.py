"""A GGUF file that was read before: the same model, without transformers' half minute."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tiny_gguf import MIXED, copy_gguf, tiny_gguf
from torch import Tensor

import cerberus_ext
from cerberus_ext.io import default_model, gguf_index
from cerberus_ext.io.gguf_header import read_header


@pytest.fixture
def file(own_cache: Path, tmp_path: Path) -> Path:
    tiny_gguf(tmp_path / "tiny.gguf", 64, MIXED)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An entry for every time that transformers reads a file."""
    times: list[Path] = []
    read = default_model.read_gguf

    def counted(path: Path, dtype: torch.dtype) -> object:
        times.append(path)
        return read(path, dtype)

    monkeypatch.setattr(default_model, "read_gguf", counted)
    return times


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**model.state_dict(), **dict(model.named_buffers())}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_second_load_is_the_first(file: Path, reads: list[Path], dtype: torch.dtype) -> None:
    first, words = cerberus_ext.load_gguf(file, dtype=dtype, device="cpu")
    again, same_words = cerberus_ext.load_gguf(file, dtype=dtype, device="cpu")
    assert reads == [file] and not again.training and again.dtype == dtype
    assert type(again) is type(first) and again.name_or_path == first.name_or_path
    assert state(again).keys() == state(first).keys()
    assert all(tensor.equal(state(first)[name]) for name, tensor in state(again).items())
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    config = again.config.to_dict()
    assert {name: value for name, value in first.config.to_dict().items() if config[name] != value} == {}
    assert again.generation_config.to_dict() == first.generation_config.to_dict()
    assert same_words("hello world").input_ids == words("hello world").input_ids


def test_queries_have_another_order_of_rows(file: Path) -> None:
    """As llama.cpp keeps them: it is the rows that are found again, whatever that order is."""
    cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    model, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    stored = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "blk.0.attn_q.weight")
    weight = model.get_submodule("model.layers.0.self_attn.q_proj").weight
    values = torch.from_numpy(dequantize(stored.data, stored.tensor_type)).bfloat16()
    assert not weight.equal(values) and weight.sort(0).values.equal(values.sort(0).values)


def test_a_file_that_was_changed_is_read_again(file: Path, reads: list[Path]) -> None:
    """Its time of change, its size, or its header."""
    cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(0, 7))
    changed, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    again, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    assert len(reads) == 2
    assert all(tensor.equal(state(changed)[name]) for name, tensor in state(again).items())


@pytest.mark.parametrize("keep_dense", [True, False])
def test_another_file_of_the_same_header_size_and_time(file: Path, tmp_path: Path, keep_dense: bool) -> None:
    """As two models of one family have them out of an archive: each has its own weights."""
    other = tmp_path / "other.gguf"
    copy_gguf(file, file.with_suffix(".new"), lambda tensor, weights: weights)
    copy_gguf(file, other, lambda tensor, weights: (weights[0][::-1].copy(), weights[1]))
    file.with_suffix(".new").replace(file)
    found = []
    for path in (file, other):
        os.utime(path, ns=(0, 7))
        model, _ = cerberus_ext.load_gguf(path, dtype=torch.bfloat16, device="cpu", keep_dense=keep_dense)
        found.append(model.get_submodule("model.layers.0.mlp.down_proj").weight)
    assert file.stat().st_size == other.stat().st_size and read_header(file).content == read_header(other).content
    assert found[1].equal(found[0].flip(0)) and not found[1].equal(found[0])


def test_what_another_process_has_kept_stays(file: Path, own_cache: Path) -> None:
    """Two read the file at the same time: the later one does not take away what the other one has begun to read."""
    model, words = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu", keep_dense=False)
    (dense,) = own_cache.glob("gguf/*/dense.safetensors")
    index = gguf_index.GgufIndex.of(file, torch.bfloat16, own_cache / "gguf")
    assert index is not None
    index.keep(model, words)
    assert dense.is_file() and [folder.name for folder in (own_cache / "gguf").iterdir()] == [dense.parent.name]


def test_what_was_kept_and_is_damaged_is_made_again(file: Path, own_cache: Path, reads: list[Path]) -> None:
    cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    (folder,) = (own_cache / "gguf").iterdir()
    (folder / "tensors.json").write_text("{}")
    for _ in range(2):
        cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    assert len(reads) == 2


def test_a_cache_that_cannot_be_written_to(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    (tmp_path / "taken").touch()
    monkeypatch.setenv("CERBERUS_CACHE", str(tmp_path / "taken"))
    for _ in range(2):
        cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    assert len(reads) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_in_a_file_of_their_own(file: Path, own_cache: Path, reads: list[Path], dtype: torch.dtype) -> None:
    """The first load makes it; the second one finds it. It is read as what it is by whoever reads weights."""
    dense, words = cerberus_ext.load_gguf(file, dtype=dtype, device="cpu")
    ids = words("hello world", return_tensors="pt").input_ids
    for _ in range(2):
        mapped, _ = cerberus_ext.load_gguf(file, dtype=dtype, device="cpu", keep_dense=False)
        assert all(tensor.equal(state(dense)[name]) for name, tensor in state(mapped).items())
        assert mapped.get_input_embeddings().weight is mapped.get_output_embeddings().weight
        for fuse in (True, False):
            ours, theirs = (
                cerberus_ext.decode(model, None, ids, max_new_tokens=9, fuse=fuse) for model in (mapped, dense)
            )
            assert ours.sequences.equal(theirs.sequences)
        assert mapped.generate(ids, max_new_tokens=9).equal(dense.generate(ids, max_new_tokens=9))
    assert len(reads) == 1 and len(list(own_cache.glob("gguf/*/dense.safetensors"))) == 1


def test_such_a_file_that_is_damaged_is_made_again(file: Path, own_cache: Path) -> None:
    first, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu", keep_dense=False)
    expected = {name: tensor.clone() for name, tensor in state(first).items()}
    (dense,) = own_cache.glob("gguf/*/dense.safetensors")
    damaged = dense.with_suffix(".new")
    damaged.write_bytes(dense.read_bytes()[:-1] + b"x")
    damaged.replace(dense)
    again, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu", keep_dense=False)
    assert all(tensor.equal(expected[name]) for name, tensor in state(again).items())


def test_weights_stay_in_memory_where_no_file_can_be_written(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, tensors: dict[str, Tensor]) -> None:
        raise OSError(28, "No space left on device", str(path))

    dense, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    monkeypatch.setattr(gguf_index, "write_tensors", full)
    kept, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu", keep_dense=False)
    assert all(tensor.equal(state(dense)[name]) for name, tensor in state(kept).items())


def test_other_types_are_dequantized_by_gguf(own_cache: Path, tmp_path: Path, reads: list[Path]) -> None:
    """Those that the library does not know, and plain numbers."""
    kinds = {"attn_q": "IQ4_NL", "ffn_up": "F16", "ffn_down": "BF16", "ffn_gate": "Q5_1", "token_embd": "Q5_0"}
    random = tmp_path / "other.gguf"
    tiny_gguf(random, 64, {name: GGMLQuantizationType[kind] for name, kind in kinds.items() if kind != "IQ4_NL"})
    with_codes(random, "blk.0.attn_q.weight", GGMLQuantizationType.IQ4_NL)
    first, _ = cerberus_ext.load_gguf(random, dtype=torch.bfloat16, device="cpu")
    again, _ = cerberus_ext.load_gguf(random, dtype=torch.bfloat16, device="cpu")
    assert len(reads) == 1
    assert all(tensor.equal(state(first)[name]) for name, tensor in state(again).items())


def with_codes(file: Path, changed: str, kind: GGMLQuantizationType) -> None:
    """Writes the file again, one tensor of 64 by 64 as blocks of another kind, of which gguf makes none."""
    blocks = np.random.default_rng(0).integers(0, 60, (64, 2 * 18), dtype=np.uint8)  # scales are finite
    new = file.with_suffix(".new")
    copy_gguf(file, new, lambda tensor, weights: (blocks, kind) if tensor.name == changed else weights)
    new.replace(file)


def test_tensors_are_where_gguf_finds_them(file: Path) -> None:
    reader, content = GGUFReader(file), file.read_bytes()
    tensors = read_header(file).tensors
    assert tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        found = tensors[tensor.name]
        assert found.shape == tuple(reversed(tensor.shape.tolist())) and found.kind == tensor.tensor_type
        assert content[found.begin : found.begin + found.size] == tensor.data.tobytes()
