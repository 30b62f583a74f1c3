"""A server on a free port of this machine, and what its decoder may be instead of a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from tiny_chat import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cerberus_ext.runtime.stats import DecodeStats
from cerberus_ext.runtime.stepper import Chunk
from cerberus_ext.serving.app import Settings, create_app
from cerberus_ext.serving.engine import Engine

TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"
END = 2


def tiny(folder: Path) -> tuple[Any, Any]:
    save_model(folder, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer


class Scripted:
    """A decoder whose every text is the tokens 3, 4, 5 ... in chunks of two.

    pause: seconds before each chunk. fails_at: the chunk at which it breaks. closed: streams that have ended.
    """

    def __init__(self, pause: float = 0.0, fails_at: int | None = None) -> None:
        self.pause, self.fails_at, self.closed = pause, fails_at, 0
        self.stats: DecodeStats | None = None

    def stream(self, ids: Any, max_new_tokens: int = 256, **_: Any) -> Iterator[Chunk]:
        self.stats = DecodeStats()
        return self._chunks(max_new_tokens)

    def _chunks(self, tokens: int) -> Iterator[Chunk]:
        try:
            for number in range(tokens // 2):
                time.sleep(self.pause)
                if number == self.fails_at:
                    raise MemoryError("no memory")
                yield Chunk([3 + 2 * number % 50, 4 + 2 * number % 50], [0, None])
        finally:
            self.closed += 1


@contextmanager
def served(decoder: Any, tokenizer: Any, waiting: int = 8, **settings: Any) -> Iterator[httpx.Client]:
    """A client of the server, which runs while inside."""
    all_settings = {"model": "tiny", "positions": 256, "max_new_tokens": 16, "ends": frozenset({END}), **settings}
    with Engine(decoder, waiting) as engine:
        config = uvicorn.Config(create_app(engine, tokenizer, Settings(**all_settings)), port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            until(lambda: server.started)
            port = server.servers[0].sockets[0].getsockname()[1]
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join()


def until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def chat(text: str = "w3 w4", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def events(response: httpx.Response) -> list[Any]:
    """Of a stream that has ended as it should."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
