"""A server on a free port of this machine, and what its decoder may be instead of a model."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
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
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def tiny(folder: Path) -> tuple[Any, Any]:
    save_model(folder, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer


class Scripted:
    """A decoder whose every text is the tokens 3, 4, 5 ... in chunks of two.

    pause: seconds before each chunk. fails_at: the chunk of a text at which all of them break. steps: so far.
    ended: texts that did.
    """

    def __init__(self, pause: float = 0.0, fails_at: int | None = None) -> None:
        self.pause, self.fails_at, self.steps, self.ended = pause, fails_at, 0, 0

    def batch(self, slots: int) -> ScriptedBatch:
        return ScriptedBatch(self)


class ScriptedBatch:
    """See engine/batch.py."""

    def __init__(self, decoder: Scripted) -> None:
        self._decoder, self._texts, self._count = decoder, list[Any](), 0

    def add(self, ids: Any, max_new_tokens: int = 256, **_: Any) -> Any:
        text = SimpleNamespace(ended=False)
        request = SimpleNamespace(row=self._count, stats=DecodeStats(), text=text, error=None)
        request.left, request.made = max_new_tokens // 2, 0
        self._count += 1
        self._texts.append(request)
        return request

    def end(self, request: Any) -> None:
        request.text.ended = True

    def chunks(self) -> Iterator[Chunk]:
        while self._texts:
            time.sleep(self._decoder.pause)
            self._decoder.steps += 1
            for request in list(self._texts):
                if request.made == self._decoder.fails_at:
                    raise MemoryError("no memory")
                token = 3 + 2 * request.made % 50
                request.made += 1
                request.text.ended |= request.made == request.left
                yield Chunk([token, token + 1], [0, None], request.row)
                if request.text.ended:
                    self._texts.remove(request)
                    self._decoder.ended += 1


@contextmanager
def served(decoder: Any, tokenizer: Any, waiting: int = 8, slots: int = 1, **settings: Any) -> Iterator[httpx.Client]:
    """A client of the server, which runs while inside."""
    all_settings = {"model": "tiny", "positions": 256, "max_new_tokens": 16, "ends": frozenset({END}), **settings}
    with Engine(decoder, waiting, slots) as engine:
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


def until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def chat(text: str = "w3 w4", **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def answered(client: httpx.Client, body: dict[str, Any], path: str = CHAT) -> Any:
    """The whole answer."""
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[Any]:
    """Of a stream that has ended as it should."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
