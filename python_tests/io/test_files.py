"""Files are whole or not there, also where the disk is full; folders that cannot be written to are found out early."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cerberus_ext.io import files
from cerberus_ext.io.json_lines import read_json_lines

BYTES = 4096


@contextmanager
def small_files() -> Iterator[None]:
    """The operating system refuses to write more than BYTES to a file, as it refuses to on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("kind", ["bytes", "json", "tensors"])
def test_a_failed_write_leaves_the_old_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"before")
    with small_files(), pytest.raises(OSError, match=f"{file}") as caught:
        if kind == "bytes":
            files.write_bytes(file, b"x" * (BYTES + 1))
        elif kind == "json":
            files.write_json(file, ["x" * BYTES])
        else:
            files.write_tensors(file, {"x": torch.zeros(BYTES)})
    assert "too large" in str(caught.value)
    assert file.read_bytes() == b"before" and [one.name for one in tmp_path.iterdir()] == ["file"]


def test_numbers_that_json_has_not_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        files.write_json(tmp_path / "file", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.whole(tmp_path / "file") as partial:
        partial.write_bytes(b"half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with files.whole(tmp_path / "file") as partial:
        partial.write_bytes(b"new")
        left = partial.with_name(partial.name.replace("file.", "other."))
        left.write_bytes(b"half")
    users = [tmp_path / "thesis.partial", tmp_path / "file.1.partial"]
    for file in users:
        file.write_bytes(b"mine")
    files.remove_partial(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "file", *users])


def test_check_writable(tmp_path: Path) -> None:
    files.check_writable("train: output", tmp_path / "not" / "there" / "yet")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="train: output: .*: there is room for .* MB, but 1000000000000 MB are needed"):
        files.check_writable("train: output", tmp_path, 10**18)
    with pytest.raises(OSError, match="train: output: /proc/heads cannot be written to: "):
        files.check_writable("train: output", Path("/proc/heads"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="train: output: .*/file/heads cannot be written to: Not a directory"):
        files.check_writable("train: output", tmp_path / "file" / "heads")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\nno\n', "lines.jsonl line 2: must be JSON, got 'no'"),
        (b'{"a": 1}\n\n\xff\xfe\n', "lines.jsonl line 3: must be UTF-8 text, got byte 0xff"),
        (b"[" * 100_000, "lines.jsonl line 1: must be JSON"),
    ],
)
def test_json_lines_name_the_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_json_lines(file))


def test_json_lines_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert [value for _, value in read_json_lines(tmp_path / "lines.jsonl")] == [{"a": 1}]
