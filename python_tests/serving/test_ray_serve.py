"""`cerberus serve --ray`: the same server as replicas on a cluster of two nodes."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_clusters import two_nodes
from serving_runs import CHAT, COMPLETIONS, answered, chat, events, tiny, until

from cerberus_ext import decode

pytestmark = pytest.mark.slow


@contextmanager
def served(folder: Path, address: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "cerberus_ext.cli", "serve", "--model", str(folder), "--name", "tiny"]
    command += ["--heads", "none", "--dtype", "float32", "--max-new-tokens", "16", "--slots", "3"]
    command += ["--ray", address, "--replicas", "2", "--port", port]
    environment = {**os.environ, "CERBERUS_API_KEY": "k"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        said = []
        while not (found := re.search(r"\[serving tiny at (\S+)/v1\]", said[-1] if said else "")):
            assert (line := process.stderr.readline()), "".join(said)
            said.append(line)
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_the_server_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    model, tokenizer = tiny(folder)
    tokenizer.save_pretrained(folder)  # with its template

    def want(words: str, **options: Any) -> str:
        ids = tokenizer(words, return_tensors="pt").input_ids
        new = decode(model, None, ids, **{"max_new_tokens": 16, **options}).sequences[0, ids.shape[1] :]
        return str(tokenizer.decode(new, skip_special_tokens=True))

    with two_nodes(monkeypatch, tmp_path) as address, served(folder, address) as (process, url):
        keys = {"authorization": "Bearer k"}
        with httpx.Client(base_url=url, headers=keys, timeout=60, trust_env=False) as client:
            check_refusals(client)
            check_answers(client, want)
            check_streams(client, want)
            check_end(client, process)
            assert process.wait(60) == 0


def check_refusals(client: httpx.Client) -> None:
    assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    assert client.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 401
    refused = client.post(CHAT, json=chat(tools=[{"type": "function"}]))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
    assert client.post(CHAT, json=chat("w3 " * 500_000)).status_code == 413


def check_answers(client: httpx.Client, want: Any) -> None:
    """By both replicas, with drafts of other requests beside them."""
    draw = random.Random(0)
    asked = [(f"w{draw.randrange(50)} w4", {"temperature": seed % 2, "seed": seed}) for seed in range(40)]
    with ThreadPoolExecutor(12) as pool:
        got = list(pool.map(lambda each: answered(client, chat(each[0], **each[1])), asked))
    for (words, options), answer in zip(asked, got, strict=True):
        assert answer["choices"][0]["message"]["content"] == want(words, **options)
    seconds = "cerberus_first_token_seconds_sum"  # of the replica that is asked
    told = {line for _ in range(60) for line in client.get("/metrics").text.splitlines() if line.startswith(seconds)}
    assert len(told) == 2 and not any(line.endswith(" 0.0") for line in told)


def check_streams(client: httpx.Client, want: Any) -> None:
    """In pieces as they come; one whose client leaves ends."""
    with client.stream("POST", CHAT, json=chat(stream=True)) as response:
        parts = events(response)
    content = [part["choices"][0]["delta"].get("content", "") for part in parts]
    assert "".join(content) == want("w3 w4") and len(content) > 3
    with client.stream("POST", CHAT, json=chat("w5 w5", stream=True, max_tokens=250)) as response:
        next(response.iter_lines())
    until(lambda: all("cerberus_running_requests 0.0" in client.get("/metrics").text for _ in range(10)))


def check_end(client: httpx.Client, process: subprocess.Popen[str]) -> None:
    """SIGTERM: what is being answered is answered."""
    body = {"model": "tiny", "prompt": "w3 w4", "max_tokens": 200, "stream": True, "temperature": 0}
    with client.stream("POST", COMPLETIONS, json=body) as response:
        next(lines := response.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
