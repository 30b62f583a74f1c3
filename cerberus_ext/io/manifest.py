"""What a cached model folder should hold: a file with the size and the SHA-256 of every other one.

Sizes are compared whenever the folder is used. The contents are read again only where a file's time of change is
another one than when the manifest was made, or where the model cannot be loaded: a start reads no byte more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .files import PARTIAL, read_object, sha256, write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    files: dict[str, Any] = {}
    for file in sorted(folder.iterdir()):
        if file.name == MANIFEST or PARTIAL.fullmatch(file.name):  # of another process, which writes the same
            continue
        status = file.stat()
        files[file.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "sha256": sha256([file])}
    write_json(folder / MANIFEST, {"files": files})


def has_manifest(folder: Path) -> bool:
    return (folder / MANIFEST).exists()


def is_listed(folder: Path, name: str) -> bool:
    """Whether the folder's manifest has a file of that name."""
    return name in (read_object(folder / MANIFEST) or {}).get("files", {})


def find_damage(folder: Path, contents: bool = False) -> str | None:
    """What is wrong with the folder's files, None where nothing is or where it has no manifest. contents: read all."""
    if not folder.is_dir():
        return "it is no folder"
    if not has_manifest(folder):
        return None  # loading it will tell
    try:
        for name, facts in (read_object(folder / MANIFEST) or {})["files"].items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            status = file.stat()
            if status.st_size != facts["size"]:
                return f"{name} has {status.st_size} bytes of {facts['size']}"
            if (contents or status.st_mtime_ns != facts["mtime_ns"]) and sha256([file]) != facts["sha256"]:
                return f"{name} has another SHA-256"
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None
