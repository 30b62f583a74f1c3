"""What a model's name may be, and what is wrong with a folder that cannot be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .heads_file import HUB_ID, is_heads_folder


def check_model_name(name: str | os.PathLike[str]) -> None:
    """Raises OSError where `name` can be neither a folder with a model nor a Hub id."""
    text, folder = str(name), Path(name)
    if folder.is_dir():
        if is_heads_folder(folder):
            raise OSError(f"{text} is a folder of Cerberus heads, not of a model")
        if not (folder / "config.json").exists():
            raise OSError(f"{text} has no config.json, so it is no folder of a model")
    elif folder.exists():
        raise NotADirectoryError(f"{text} is a file, not a folder")
    elif not HUB_ID.fullmatch(text) and not HUB_ID.fullmatch(f"user/{text}"):
        raise FileNotFoundError(f"there is no folder {text!r}, and it is no Hub id (user/name)")


def load_error(name: str | os.PathLike[str], error: Exception) -> OSError:
    """One sentence about what kept a model from being loaded; names the damaged file, where there is one."""
    reason = first_line(str(error)) or type(error).__name__
    folder = Path(name)
    if not folder.is_dir() and isinstance(error, OSError):
        return OSError(f"{name}: there is no such folder, and not on the Hub either: {reason}")
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if (problem := damage(file)) is not None:
            return OSError(f"{file} is damaged ({problem})")
    return OSError(f"{name} cannot be loaded: {reason}")


def damage(file: Path) -> str | None:
    """Why a JSON or safetensors file cannot be read; None where it can, and for other files."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix == ".safetensors":
            file.open("rb").close()  # safetensors itself would not tell why
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return first_line(str(error))
    return None


def first_line(text: str) -> str:
    """The first line with something in it, and what follows where it ends with a colon."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return lines[0] if lines else ""
