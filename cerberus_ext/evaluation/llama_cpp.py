"""llama.cpp next to the other ways: the default model's weights, the same prompts and threads, in processes of its own.

It is the Python package xllamacpp, a llama.cpp built for CPUs, of another Python: nothing of it is loaded here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from select import select
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from ..io.default_gguf import default_gguf
from ..runtime.stats import DecodeStats
from .ways import LLAMA_BF16, LLAMA_Q4_1

SOURCE = Path(__file__).with_name("llama_cpp_child.py")
# Longer than any machine takes on which a comparison says something: what takes longer hangs.
START_SECONDS = 300.0  # to import, and to load
PROMPT_SECONDS, TOKEN_SECONDS = 120.0, 2.0
WAYS = {  # name -> which file, what it is
    LLAMA_BF16: ("bf16", "the same weights in bfloat16"),
    LLAMA_Q4_1: ("q4_1", "the file of 4 bits that the weights are expanded from"),
}


class Child:
    """A process of `python`. A context, which the process does not outlive, nor what it started.

    All failures are RuntimeErrors of one sentence.
    """

    def __init__(self, python: str) -> None:
        self.python = python
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - of the process: it closes with this object
        try:  # in a session of its own: Ctrl-C is for this process, which ends it
            self.process = subprocess.Popen(
                [python, "-c", SOURCE.read_text()], bufsize=0, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
            )  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"bench: llama_cpp: {python}: {error.strerror}") from error

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:  # waits for it, and closes its pipes
            pass

    def ask(self, message: dict[str, Any], name: str, kind: type) -> Any:
        """Sends a line; returns what the line that is the answer has under `name`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended: the answer is empty
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
        if not select([self.process.stdout], [], [], START_SECONDS)[0]:
            raise self.failure(f"says nothing for {START_SECONDS:g} s")
        return self.value(self.process.stdout.read(1 << 16), name, kind)  # what there is: a line is written at once

    def value(self, text: bytes, name: str, kind: type) -> Any:
        with suppress(ValueError, LookupError, TypeError):
            if isinstance(value := json.loads(text)[name], kind):
                return value
        raise self.failure(f"answers {text[:200]!r}")

    def failure(self, what: str) -> RuntimeError:
        """That it has ended, and its last words, or else `what` it does."""
        with suppress(subprocess.TimeoutExpired):
            status = self.process.wait(timeout=1)  # it may be about to
            self.log.seek(0)
            words = self.log.read().decode(errors="replace").strip().rpartition("\n")[2]
            what = f"ended with status {status}: {words or 'no message'}"
        return RuntimeError(f"bench: llama_cpp: {self.python} {what}")


@dataclass
class LlamaCppWay:
    """A server of the child. address: host:port."""

    name: str
    child: Child
    address: str
    description: str
    not_compared: str = "llama.cpp rounds otherwise, so they are other texts, of other lengths"

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        ask = {"prompt": ids[0].tolist(), "n_predict": new_tokens, "temperature": 0, "cache_prompt": False}
        seconds = PROMPT_SECONDS + TOKEN_SECONDS * new_tokens
        try:
            with closing(HTTPConnection(self.address, timeout=seconds)) as connection:
                connection.request("POST", "/completion", json.dumps({**ask, "return_tokens": True}))
                text = connection.getresponse().read()
        except TimeoutError:
            raise self.child.failure(f"does not answer in {seconds:g} s") from None
        except (OSError, HTTPException) as error:
            raise self.child.failure(f"does not answer: {error!r}") from error
        return self.child.value(text, "tokens", list), None


@contextmanager
def llama_cpp_ways(python: str | None) -> Iterator[list[LlamaCppWay]]:
    """Those of this Python, with as many threads as torch has; None: none. They end with the context.

    Raises RuntimeError, as a run of theirs does, where it has no xllamacpp, ends, hangs, or answers something else.
    """
    if python is None:
        yield []
        return
    with ExitStack() as stack:
        # A process for each: OpenMP's threads of two servers in one, more than there are cores, do not spin at
        # barriers, and each server has a third of its speed.
        children = [stack.enter_context(Child(python)) for _ in WAYS]
        versions = [child.ask({}, "version", str) for child in children]
        try:
            files = default_gguf()
        except (OSError, RuntimeError) as error:
            raise RuntimeError(f"bench: llama_cpp: there are no GGUF files of the default model: {error}") from error
        ways = []
        for (name, (kind, what)), child, version in zip(WAYS.items(), children, versions, strict=True):
            order = {"files": [str(files[kind])], "threads": torch.get_num_threads()}
            (address,) = child.ask(order, "addresses", list)
            ways.append(LlamaCppWay(name, child, urlsplit(address).netloc, f"xllamacpp {version}, {what}"))
        yield ways
