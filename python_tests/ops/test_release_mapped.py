"""The system gets back what a file has, and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cerberus_ext.ops.step import release_mapped

PAGES, PAGE = 64, 4096  # the second is at least that elsewhere, where fewer of them are given back

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells which pages are a file's")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    numbers = torch.arange(PAGES * PAGE // 4, dtype=torch.int32)
    (tmp_path / "numbers").write_bytes(numbers.numpy().tobytes())
    return tmp_path / "numbers"


def mapped(file: Path, shared: bool = False) -> Tensor:
    """Of the file, every page of it in memory."""
    tensor = torch.from_file(str(file), shared, file.stat().st_size // 4, dtype=torch.int32)
    assert tensor.sum(dtype=torch.int64) > 0
    return tensor


def test_what_is_in_the_file_is_given_back_and_read_again(file: Path) -> None:
    tensor = mapped(file)
    assert release_mapped(tensor) >= PAGES * PAGE // 2
    assert release_mapped(tensor) == 0, "it is in memory no more"
    assert tensor.equal(torch.arange(len(tensor), dtype=torch.int32))


@pytest.mark.parametrize("shared", [False, True])
def test_what_was_written_stays(file: Path, shared: bool) -> None:
    """Every second page, and in the middle of pages."""
    tensor = mapped(file, shared)
    tensor[:: PAGE // 2] = -7
    before = tensor.clone()
    release_mapped(tensor)
    assert tensor.equal(before)
    assert tensor[0] == -7 and tensor[1] == 1


def test_part_of_a_mapping_leaves_the_rest(file: Path) -> None:
    tensor = mapped(file)
    part = tensor[PAGE : -PAGE - 5]
    assert 0 < release_mapped(part) <= part.nbytes
    assert release_mapped(tensor) > 0
    assert tensor.equal(torch.arange(len(tensor), dtype=torch.int32))


def test_memory_of_no_file_stays() -> None:
    tensor = torch.arange(1 << 18)
    assert release_mapped(tensor) == 0
    assert tensor.equal(torch.arange(1 << 18))


def test_nothing_and_less_than_a_page(file: Path) -> None:
    assert release_mapped(torch.empty(0)) == 0
    assert release_mapped(mapped(file)[1:5]) == 0


def test_what_is_refused() -> None:
    with pytest.raises(RuntimeError, match="^release_mapped: memory must be contiguous, got shape"):
        release_mapped(torch.zeros(4, 4).t())
