"""Processes of `cerberus` that begin with torch and transformers imported, which takes seconds: each is forked from one
that has done nothing else, and ends as a process of its own does, with the interpreter.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

CLOSED = "a pipe that nobody reads"


class WarmProcess:
    """`cerberus` with arguments, or a script, on one thread; as subprocess.Popen, as far as tests need it.

    stdout: None, a file's path or CLOSED; `communicate` gives what it prints to stderr, and to stdout where that is
    None. environment: in addition.
    """

    def __init__(
        self, *arguments: str | Path, script: str | None = None, stdout: str | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._folder = Path(tempfile.mkdtemp())
        request = {
            "arguments": [str(argument) for argument in arguments], "script": script, "stdout": stdout,
            "environment": environment or {}, "folder": str(self._folder),
        }  # fmt: skip
        requests = _server().stdin
        assert requests is not None
        requests.write(json.dumps(request) + "\n")
        requests.flush()
        self._wait_for("pid", time.monotonic() + 60)
        self.pid = int((self._folder / "pid").read_text())

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative where a signal has ended it."""
        file = self._folder / "status"
        return int(file.read_text()) if file.exists() else None

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, None]:
        """What it printed, at its end."""
        try:
            self._wait_for("status", time.monotonic() + timeout)
        except TimeoutError:
            self.send_signal(signal.SIGKILL)
            raise
        return (self._folder / "printed").read_text(), None

    def _wait_for(self, name: str, end: float) -> None:
        while not (self._folder / name).exists():
            assert _server().poll() is None, "the process that others are forked from has ended"
            if time.monotonic() > end:
                raise TimeoutError(f"no {name}: {(self._folder / 'printed').read_text()}")
            time.sleep(0.005)


@cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, __file__],
        cwd=tempfile.gettempdir(),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(server.wait, 10)
    atexit.register(lambda: server.stdin and server.stdin.close())  # called before
    return server


# ---------------------------------------------------------------- in the server


def _next_request() -> dict[str, Any]:
    """Returns in a process for each request, which is to serve it."""
    while line := sys.stdin.readline():
        request = json.loads(line)
        if os.fork() == 0:
            child = os.fork()
            if child == 0:
                return request
            _write(request, "pid", child)
            _write(request, "status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os._exit(0)
        _reap()
    _reap()
    os._exit(0)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _write(request: dict[str, Any], name: str, number: int) -> None:
    file = Path(request["folder"]) / name
    partial = file.with_suffix(".partial")
    partial.write_text(str(number))
    partial.replace(file)


def _become(request: dict[str, Any]) -> None:
    """What a process finds that was started for this request alone."""
    printed = os.open(Path(request["folder"]) / "printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    given, reader, stdout = request["stdout"], None, printed
    if given == CLOSED:
        reader, stdout = os.pipe()
    elif given is not None:
        stdout = os.open(given, os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, stdout, printed)):
        os.dup2(file, number)
    for file in {nothing, stdout, printed, *([] if reader is None else [reader])}:
        os.close(file)
    os.environ.update(request["environment"])
    sys.argv = [request["script"] or "cerberus", *request["arguments"]]


if __name__ == "__main__":
    # What the commands import when they are asked.
    import accelerate  # noqa: F401
    import torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import cerberus_ext.evaluation.evaluate
    import cerberus_ext.training.run  # noqa: F401
    from cerberus_ext.cli.main import main

    asked = _next_request()
    _become(asked)
    if asked["script"]:
        runpy.run_path(asked["script"], run_name="__main__")
    else:
        main()
