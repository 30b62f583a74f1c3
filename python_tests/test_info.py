"""What `cerberus info` shows."""

from __future__ import annotations

import platform

import pytest
import torch

from cerberus_ext import _load, info


def test_sections_and_what_they_must_name() -> None:
    sections = info.collect()
    assert list(sections) == ["Versions", "Libraries", "CPU", "CUDA"]
    assert all(isinstance(value, str) and value for section in sections.values() for value in section.values())
    assert torch.__version__ in sections["Versions"]["torch"]
    assert platform.python_version() in sections["Versions"]["Python"]
    assert sections["Libraries"]["_C.so"] == f"loaded from {_load.PACKAGE / '_C.so'}"
    assert f"torch {_load.build_record()['torch']}" in sections["Libraries"]["built"]


def test_the_chosen_kernels_are_among_those_built() -> None:
    chosen, built = info.collect()["CPU"]["kernels"].split(", of ")
    assert chosen in built.split()
    if "avx2" not in info.cpu_features():
        assert chosen == "portable"


def test_a_library_that_is_not_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _load.Library("_cuda.so", _load.PACKAGE / "_cuda.so", loaded=False, reason="no GPU today")
    monkeypatch.setattr(_load, "load_libraries", lambda: (missing,))
    assert info.collect()["Libraries"]["_cuda.so"] == "not loaded: no GPU today"


def test_printed_as_one_label_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    info.print_info()
    lines = capsys.readouterr().out.splitlines()
    sections = info.collect()
    assert len(lines) == len(sections) + sum(len(section) for section in sections.values())
    assert "Libraries" in lines
    assert any(line.split()[:1] == ["_C.so"] for line in lines)
