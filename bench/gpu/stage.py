"""What the stages of a GPU session have in common: arguments, a deadline, and results that outlive the process.

    python bench/gpu/stage.py bench/gpu/stages/kernels.py --out kernels.json

A stage is a file with a function `body(run)`. It fills `result` and names in `problems` what it found to be wrong.
Its file is written after every row, whole or not at all, so that a crash loses only the row at which it happened.
Started again with the same file, a stage goes on behind that row.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROBLEMS = 3  # exit status of a stage that ran to its end and found something wrong
# What stages import.
sys.path += [str(ROOT / name) for name in ("bench/shared", "python_tests/helpers", "bench/gpu/stages")]
if (ROOT / "cerberus_ext" / "_C.so").exists():  # built where it lies; nothing needs to be installed
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


class Skipped(Exception):
    """There is nothing to run here; the message says why."""


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half of it."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, file)


class Stage:
    """result: for the report. problems: what is wrong. unfinished: why not all was done; None: it was."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device: str = arguments.device
        self.on_cpu = self.device == "cpu"  # only to see that the stage works: everything is tiny
        self.deadline = time.monotonic() + arguments.seconds
        before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
        self.result: dict[str, Any] = before.get("result", {})
        self.problems: list[str] = before.get("problems", [])
        self.unfinished: str | None = None
        self.skipped: str | None = None
        self.running: str | None = None
        self._begun = time.monotonic()
        self._longest = 0.0
        if died_at := before.get("running"):
            self.add(died_at, {"error": "the process died here, or was stopped for taking too long"})
            self.problems.append(f"{died_at}: the process died")

    @property
    def left(self) -> float:
        """Seconds until the stage has to be done."""
        return self.deadline - time.monotonic()

    @property
    def rows(self) -> dict[str, Any]:
        """key -> what was found, as `add` took it."""
        return self.result.setdefault("rows", {})

    def begin(self, key: str, limit: int = 30, needed: float = 1.0) -> bool:
        """Whether to do this row: not if it is there already, nor if it will not be done in time.

        needed: seconds that it takes at least; the longest of the rows so far is taken to be typical, too.
        A row that takes longer than `limit` seconds ends the process: a kernel that never returns cannot be stopped
        in another way.
        """
        if key in self.rows:
            return False
        if self.left <= max(needed, self._longest):
            self.unfinished = "out of time"
            return False
        self.running = key
        self.save()
        self._begun = time.monotonic()
        signal.alarm(limit)
        return True

    def add(self, key: str, row: dict[str, Any]) -> None:
        signal.alarm(0)
        self._longest = max(self._longest, time.monotonic() - self._begun)
        self.rows[key] = row
        self.running = None
        self.save()

    def save(self) -> None:
        names = ("result", "problems", "unfinished", "skipped", "running")
        write_json(self.arguments.out, {name: getattr(self, name) for name in names})


def parser() -> argparse.ArgumentParser:
    """What every stage takes; the session hands it on."""
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--model", help="folder of the model to decode with; default: the cached SmolLM2-135M-Instruct")
    made.add_argument("--heads", default="smollm2-135m-instruct", help="packaged name or folder")
    made.add_argument("--medusa", help="folder of Medusa heads for the same model")
    made.add_argument("--questions", type=Path, help="JSON lines with question_id and turns; default: some of our own")
    made.add_argument("--sanitizer", help="compute-sanitizer; default: where it is usually found")
    return made


def main() -> int:
    """Runs a stage; returns its exit status."""
    arguments_of = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[parser()]
    )
    arguments_of.add_argument("file", type=Path, help="of the stage")
    arguments_of.add_argument("--out", type=Path, required=True, help="JSON")
    arguments_of.add_argument("--seconds", type=float, default=300.0, help="to be done within")
    run = Stage(arguments_of.parse_args())
    sys.modules["stage"] = sys.modules[__name__]  # what the stage imports, too
    spec = importlib.util.spec_from_file_location("stage_body", run.arguments.file)
    assert spec is not None and spec.loader is not None
    body = sys.modules["stage_body"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(body)
    try:
        body.body(run)
    except Skipped as reason:
        run.skipped = str(reason)
    run.save()
    return PROBLEMS if run.problems else 0


if __name__ == "__main__":
    sys.exit(main())
