"""What a run has measured so far: a file of JSON lines, so that a run that was stopped goes on where it was.

    {"identity": {...}, "about": {...}}    the first line: what must be the same for a run to go on; more about it
    {"key": "81/1/0/generate", ...}        a measurement each

A key is question/turn/round/way, or question/turn/round for what a comparison of the ways' texts found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results(dict[str, dict[str, Any]]):
    """By key. identity: None where nothing was begun."""

    def __init__(self, file: Path) -> None:
        """Reads what is there. A last line that a kill cut short is left out, and written over.

        Raises ValueError, naming the line, on anything else that is no result.
        """
        super().__init__()
        self.file = file
        self.identity: dict[str, Any] | None = None
        self.about: dict[str, Any] = {}
        whole = file.read_bytes() if file.exists() else b""
        self._end = whole.rfind(b"\n") + 1
        first, rest = b'{"key": ' if self._end else b'{"identity": ', whole[self._end :]
        if not first.startswith(rest[: len(first)]):
            raise ValueError(f"{file}: the last line must be a result, got {rest[:40]!r}; choose another folder")
        for number, line in enumerate(whole[: self._end].splitlines(), start=1):
            try:
                row = json.loads(line)
                if number == 1:
                    self.identity, self.about = dict(row["identity"]), dict(row["about"])
                else:
                    self[row["key"]] = row
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{file} line {number}: must be a result, got {line[:40]!r}; remove the file"
                    " or choose another folder"
                ) from None

    def begin(self, identity: dict[str, Any], about: dict[str, Any]) -> None:
        """Starts the file, or goes on with the one that is there: ValueError where it is of another identity."""
        identity = json.loads(json.dumps(identity))  # as it is read back
        if self.identity is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.identity, self.about = identity, about
            self._append({"identity": identity, "about": about})
        for name in identity | self.identity:
            if self.identity.get(name) != identity.get(name):
                raise ValueError(
                    f"bench: {name} must be {self.identity.get(name)} to go on with {self.file.name} of the folder,"
                    f" got {identity.get(name)}; choose another one"
                )

    def add(self, key: str, **values: Any) -> None:
        """Keeps a measurement; it is in the file when this returns."""
        self[key] = {"key": key, **values}
        self._append(self[key])

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            with self.file.open("r+b" if self.file.exists() else "wb") as out:
                out.seek(self._end)
                out.truncate()
                out.write(line)
        except OSError as error:  # of a full disk, say: writing does not tell the name
            raise OSError(error.errno, error.strerror, str(self.file)) from error
        self._end += len(line)
