"""Files of one JSON value a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, what: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (where, value) for every line that is not blank; `where` names file and line, for messages.

    what: put before it, "train: " say.
    Raises ValueError, naming the line, where one is not JSON.
    """
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"{what}{path.name} line {number}"
            try:
                yield where, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: must be JSON, got {text.strip()[:40]!r} ({error})") from None
