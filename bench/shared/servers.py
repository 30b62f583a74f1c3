"""Servers with OpenAI's interface, each a process of its own that ends with the context."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cerberus_ext.evaluation.llama_cpp import Child
from cerberus_ext.io.default_gguf import default_gguf


class Server(NamedTuple):
    """url: with /v1/ at its end. model: as the server names it. pid: of its process; 0: not told."""

    url: str
    model: str
    pid: int = 0


@contextmanager
def ours(*arguments: str) -> Iterator[Server]:
    """`cerberus serve` with these arguments, on a free port, with as many threads as torch has here."""
    command = [sys.executable, "-m", "cerberus_ext.cli", "serve", "--port", "0", "--waiting", "1024", *arguments]
    command += ["--threads", str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # the installed package, also where a checkout is
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            found = next((match for line in lines if (match := re.search(r"serving (\S+) at (\S+)\]", line))), None)
            if found is None:
                raise RuntimeError(f"{' '.join(command)} ended with {process.wait()}")
            yield Server(f"{found[2]}/", found[1], process.pid)
        finally:
            process.terminate()


@contextmanager
def llama_cpp(python: str, slots: int, context: int) -> Iterator[Server]:
    """llama.cpp's server of xllamacpp, which `python` has: the file that the default model is read from, so many
    slots of so many tokens."""
    with Child(python) as child:
        child.ask({}, "version", str)
        order = {"files": [str(default_gguf()["q4_1"])], "threads": torch.get_num_threads()}
        (address,) = child.ask({**order, "slots": slots, "context": slots * context}, "addresses", list)
        yield Server(f"{address}/v1/", "default", child.process.pid)


def resident(pid: int) -> int:
    """Bytes of memory that the process has now."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
