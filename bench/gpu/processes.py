"""Running a command with a time limit, so that nothing of it is left behind: not what it started, either."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SECONDS_TO_END = 2.0  # between asking a group of processes to end and ending it


def run(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None) -> int | None:
    """The exit status; None where the command had to be stopped. What it prints is added to `log`."""
    with log.open("a") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:  # also where this process is told to stop
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)


def end_when_told() -> None:
    """From here on SIGTERM ends this process through its `finally` clauses, and so what it runs, too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
