"""Loading the libraries: each failure says what was found and what was expected."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cerberus_ext
from cerberus_ext.ops import libraries

RECORD = {
    "system": "Linux riscv64",
    "compiler": "GNU 99.1",
    "torch": "2.99.0",
    "cuda": "no nvcc was found",
    "nvcc": "",
    "cpu_levels": ["portable", "avx2"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An installed package in which every file but the record of the build is missing."""
    package = tmp_path / "site-packages" / "cerberus_ext"
    package.mkdir(parents=True)
    (package / "build.json").write_text(json.dumps(RECORD))
    return package


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that has CUDA and sees a GPU, as far as loading asks."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_libraries_are_loaded_once() -> None:
    loaded = libraries.load_libraries()
    assert [library.name for library in loaded] == ["_C.so", "_host", "_cuda.so"]
    assert all(library.loaded for library in loaded[:2])
    assert all(library.path.is_file() for library in loaded if library.loaded)
    assert loaded[2].loaded or loaded[2].reason
    assert libraries.load_libraries() is loaded


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "2.9.0a0+git1234"])
def test_torch_that_is_too_old(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    found = f"found {version} in {Path(torch.__file__).parent}"
    with pytest.raises(ImportError) as error:
        libraries.load_libraries.__wrapped__()
    assert str(error.value) == f"cerberus_ext: needs torch >= 2.10, {found}"


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0", "2.11.0a0+git1234"])
def test_torch_that_is_new_enough(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    libraries._check_torch()


def test_incomplete_installation(folder: Path) -> None:
    with pytest.raises(ImportError) as error:
        libraries._load_cpu(folder)
    assert f"expected the library {folder / '_C.so'}, found none: the installation is incomplete" in str(error.value)


def test_source_folder(folder: Path) -> None:
    (folder.parent / "CMakeLists.txt").touch()
    with pytest.raises(ImportError) as error:
        libraries._load_cpu(folder)
    message = str(error.value)
    assert f"expected the library {folder / '_C.so'}, found a source folder in which nothing is built" in message
    assert "pip install -e . --no-build-isolation" in message


def test_source_folder_that_hides_the_installed_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "CMakeLists.txt").touch()
    installed = tmp_path / "installed" / "cerberus_ext"
    installed.mkdir(parents=True)
    (installed / "_C.so").touch()
    monkeypatch.setattr(sys, "path", [str(folder.parent), str(installed.parent)])
    with pytest.raises(ImportError, match="comes first on sys.path") as error:
        libraries._load_cpu(folder)
    assert f"The installed package is {installed}" in str(error.value)


def test_library_that_does_not_load(folder: Path) -> None:
    path = folder / "_C.so"
    path.write_bytes(b"no library")
    with pytest.raises(ImportError) as error:
        libraries._load_cpu(folder)
    said, found, expected, _ = str(error.value).splitlines()
    assert said.startswith(f"cerberus_ext: {path} does not load: ")
    assert f"torch {torch.__version__}" in found and str(Path(torch.__file__).parent) in found
    assert "torch >= 2.10" in expected
    assert "on Linux riscv64, by GNU 99.1, with torch 2.99.0, nvcc unknown" in expected


def test_host_library_of_another_python(folder: Path) -> None:
    (folder / "_host.cpython-39-x86_64-linux-gnu.so").touch()
    expected = folder / f"_host{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    with pytest.raises(ImportError) as error:
        libraries._load_host(folder)
    assert f"expected {expected} for this Python {sys.version.split()[0]}" in str(error.value)
    assert "found _host.cpython-39-x86_64-linux-gnu.so" in str(error.value)


def test_no_cuda_library_where_torch_has_no_cuda(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = libraries._load_cuda(folder)
    assert not library.loaded
    assert library.reason == f"torch {torch.__version__} is built without CUDA"


def test_no_cuda_library_where_there_is_no_gpu(folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    library = libraries._load_cuda(folder)
    assert not library.loaded
    assert library.reason == f"torch {torch.__version__} sees no GPU"


def test_gpu_without_cuda_library_warns(folder: Path, gpu: None) -> None:
    with pytest.warns(RuntimeWarning, match="this machine has a GPU, but there are no CUDA ops") as caught:
        library = libraries._load_cuda(folder)
    assert not library.loaded
    assert f"{folder / '_cuda.so'} was not built (no nvcc was found)" in library.reason
    assert library.reason in str(caught[0].message)


def test_gpu_with_a_cuda_library_that_does_not_load_warns(folder: Path, gpu: None) -> None:
    (folder / "_cuda.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="_cuda.so does not load"):
        library = libraries._load_cuda(folder)
    assert not library.loaded
    assert "(CUDA 13.0)" in library.reason and "expected: torch >= 2.10" in library.reason


def test_build_record_of_a_folder_without_one(tmp_path: Path) -> None:
    assert libraries.build_record(tmp_path) == {}
    (tmp_path / "build.json").write_text("{")
    assert libraries.build_record(tmp_path) == {}


def import_in_a_new_process(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`import cerberus_ext` with `path` first on sys.path, away from the checkout."""
    return subprocess.run(
        [sys.executable, "-c", "import cerberus_ext"],
        env={**os.environ, "PYTHONPATH": str(path), **environment},
        cwd=path,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_import_of_a_package_without_libraries(tmp_path: Path) -> None:
    without = shutil.ignore_patterns("*.so", "__pycache__", "pretrained")
    shutil.copytree(Path(cerberus_ext.__file__).parent, tmp_path / "cerberus_ext", ignore=without)
    result = import_in_a_new_process(tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith(f"ImportError: cerberus_ext: expected the library {tmp_path / 'cerberus_ext' / '_C.so'}")


def test_import_with_kernels_that_are_not_there() -> None:
    result = import_in_a_new_process(Path(cerberus_ext.__file__).parent.parent, CERBERUS_ISA="sse9")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1
    assert last.startswith("ImportError: cerberus_ext: CERBERUS_ISA must be one of")
    assert last.endswith("portable on this CPU, got sse9")
