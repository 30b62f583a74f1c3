"""Files of one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, what: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (where, value) for every line that is not blank; `where` names file and line, for messages.

    what: put before it, "train: " say.
    Raises ValueError, naming the line, where one is not JSON in UTF-8, OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.strip()
            if not text:
                continue
            where = f"{what}{path.name} line {number}"
            try:
                value = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: must be UTF-8 text, got byte {text[error.start]:#04x}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: must be JSON, got {text.decode()[:40]!r} ({error})") from None
            yield where, value
