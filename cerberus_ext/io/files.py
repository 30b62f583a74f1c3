"""Files: what is written is whole or not there, being moved into its place; what is read is named where it is wrong."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

PARTIAL = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial")  # only `whole` makes such names


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Gives a path beside `file` to write to; what is there at the end takes the place of `file`, at once.

    Where writing fails `file` stays as it was and nothing is left beside it. Several processes may do it at the same
    time: one of their files stays. Raises OSError that names `file`.
    """
    partial = file.with_name(f"{file.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())  # some file systems find out only here that they are full
        partial.replace(file)
    except (SafetensorError, OSError) as error:
        reported = re.search(r"os error (\d+)", str(error))  # in safetensors' words
        number = getattr(error, "errno", None) or (int(reported[1]) if reported else None)
        if number is None:
            raise OSError(f"{file}: {error}") from error
        raise OSError(number, os.strerror(number), str(file)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_bytes(file: Path, content: bytes) -> None:
    with whole(file) as partial:
        partial.write_bytes(content)


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def write_json(file: Path, value: Any) -> None:
    """Raises ValueError, before anything is written, on numbers that JSON has not."""
    write_text(file, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    with whole(file) as partial:
        save_file(tensors, partial, metadata)


def remove_partial(folder: Path) -> None:
    """What killed processes were writing into a folder that no other one is writing to."""
    for file in folder.glob("*.partial"):
        if PARTIAL.fullmatch(file.name) and not file.is_dir():
            file.unlink(missing_ok=True)


def read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file, None where there is no such thing."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_json_lines(path: Path, what: str = "", *, ended: bool = False) -> Iterator[tuple[str, Any]]:
    """Yields (where, value) for every line that is not blank; `where` names file and line, for messages.

    what: put before it, "train: " say. ended: without a last line that has no end.
    Raises ValueError, naming the line, where one is not JSON in UTF-8, OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text, where = line.strip(), f"{what}{path.name} line {number}"
            if not text or (ended and not line.endswith(b"\n")):
                continue
            try:
                value = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: must be UTF-8 text, got byte {text[error.start]:#04x}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: must be JSON, got {text.decode()[:40]!r} ({error})") from None
            yield where, value


def check_writable(what: str, folder: Path, bytes_needed: int = 0) -> None:
    """Raises OSError, beginning with `what`, where no file can be written to the folder, now or once it is made."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
            status = os.fstatvfs(probe.fileno())
    except OSError as error:
        raise OSError(f"{what}: {folder} cannot be written to: {error.strerror}") from error
    free = status.f_bavail * status.f_frsize
    if free < bytes_needed:
        raise OSError(
            f"{what}: {folder}: there is room for {free / 1e6:.0f} MB, but {bytes_needed / 1e6:.0f} MB are needed"
        )


def check_output_folder(what: str, folder: Path, foreign: Iterable[Path], made_by: str) -> None:
    """Whether results may be written to a folder; makes nothing. foreign: files that `made_by` has not made.

    Raises ValueError, beginning with `what`, where it is a file or one of these is there, OSError as `check_writable`.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{what}: {folder} is a file, not a folder")
    for file in foreign:
        if file.exists():
            raise ValueError(f"{what}: {file} is there already, and was not made by {made_by}; choose another folder")
    check_writable(what, folder)


def sha256(files: Iterable[Path]) -> str:
    """Of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
