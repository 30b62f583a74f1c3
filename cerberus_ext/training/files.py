"""Files that are whole or not there: everything is written beside its place and then moved into it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def partial(file: Path) -> Path:
    """Where `file` is written before it is moved into its place."""
    return file.with_name(file.name + ".partial")


def write_text(file: Path, text: str) -> None:
    partial(file).write_text(text, encoding="utf-8")
    partial(file).replace(file)


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1) + "\n")


def write_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file(tensors, partial(file), metadata)
    partial(file).replace(file)


def sha256(files: Iterable[Path]) -> str:
    """Of the files' contents, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
