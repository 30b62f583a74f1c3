"""What goes wrong with one request is documented, and disturbs no other."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_runs import CHAT, COMPLETIONS, Scripted, answered, chat, served, tiny, until
from tiny_chat import save_model

from cerberus_ext import Decoder
from cerberus_ext.serving.logprobs import Logprobs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny(tmp_path_factory.mktemp("faults"))[1]


def said(client: httpx.Client, tokens: int = 4) -> str:
    """A request that is answered."""
    return str(answered(client, chat(max_tokens=tokens))["choices"][0]["message"]["content"])


def test_a_client_that_goes_away_ends_its_answer(tokenizer: Any) -> None:
    decoder = Scripted(pause=0.02)
    with served(decoder, tokenizer, positions=1 << 20) as client:
        with client.stream("POST", CHAT, json=chat(stream=True, max_tokens=100000)) as response:
            next(response.iter_lines())
        until(lambda: decoder.ended == 1)
        with pytest.raises(httpx.ReadTimeout):  # one that waits for the whole
            client.post(CHAT, json=chat(max_tokens=100000), timeout=0.3)
        until(lambda: decoder.ended == 2)
        assert said(client) == "w0 w1 w2 w3"
        assert 'status="failed"} 2.0' in client.get("/metrics").text


def test_its_slot_is_free_within_a_step(tokenizer: Any) -> None:
    decoder = Scripted(pause=0.2)
    with served(decoder, tokenizer, positions=1 << 20) as client:
        with client.stream("POST", CHAT, json=chat(stream=True, max_tokens=100000)) as response:
            next(response.iter_lines())
            steps = decoder.steps
        until(lambda: decoder.ended == 1)
        assert decoder.steps <= steps + 3  # the one that runs, the one that notices, and one of slow machines


def test_what_is_refused_disturbs_no_other(tokenizer: Any) -> None:
    decoder = Scripted(pause=0.02)
    json_type = {"content-type": "application/json"}
    with served(decoder, tokenizer, max_body=100000) as client:
        body = chat(stream=True, max_tokens=60)
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            statuses = [
                client.post(COMPLETIONS, json={"model": "tiny", "prompt": [3] * 300}).status_code,
                client.post(CHAT, content=b"{" * 50000, headers=json_type).status_code,
                client.post(CHAT, content=b'{"a":' * 15000, headers=json_type).status_code,
                client.post(CHAT, json=chat(temperature="hot")).status_code,
                client.post(CHAT, json=chat("w3 " * 20000)).status_code,
            ]
            parts = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert statuses == [400] * 5
        content = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        assert content.split() == [f"w{number % 50}" for number in range(2, 60)]


def test_as_many_wait_as_may(tokenizer: Any) -> None:
    decoder = Scripted(pause=0.02)
    body = chat(max_tokens=100000, stream=True)
    with served(decoder, tokenizer, waiting=2, positions=1 << 20) as client:
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()  # kept: the connection ends with it
            next(lines)
            waits = threading.Thread(target=said, args=[client])
            waits.start()
            until(lambda: "cerberus_waiting_requests 1.0" in client.get("/metrics").text)
            refused = client.post(CHAT, json=chat(n=2))  # not answered in part either
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["type"] == "rate_limit_error"
            never = client.post(CHAT, json=chat(n=3))
            assert never.status_code == 400 and never.json()["error"]["param"] == "n"
        waits.join()
        assert said(client) == "w0 w1 w2 w3"


@pytest.mark.parametrize("fails_at", [0, 2])
def test_what_breaks_breaks_alone(tokenizer: Any, fails_at: int) -> None:
    decoder = Scripted(fails_at=fails_at)
    with served(decoder, tokenizer) as client:
        whole = client.post(CHAT, json=chat())
        assert whole.status_code == 500 and whole.json()["error"]["message"] == "MemoryError: the answer failed"
        with client.stream("POST", CHAT, json=chat(stream=True)) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == (500 if fails_at == 0 else 200)
        assert "MemoryError: the answer failed" in lines[-1] and "[DONE]" not in lines[-1]
        decoder.fails_at = None
        assert said(client) == "w0 w1 w2 w3"


def test_a_prompt_that_breaks_breaks_no_stream(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Logprobs, ids: Any, scores: Any) -> Any:
        raise MemoryError("no memory")

    monkeypatch.setattr(Logprobs, "__call__", broken)
    with Decoder(loaded[0]) as decoder, served(decoder, loaded[1], slots=2) as client:
        body = chat("w5 w5", stream=True, max_tokens=200)
        with client.stream("POST", CHAT, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            whole = client.post(CHAT, json=chat(logprobs=True))
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert whole.status_code == 500 and whole.json()["error"]["message"] == "MemoryError: the answer failed"


def test_a_request_may_take_so_long(tokenizer: Any) -> None:
    decoder = Scripted(pause=0.05)
    with served(decoder, tokenizer, timeout=0.4, positions=1 << 20) as client:
        late = client.post(CHAT, json=chat(max_tokens=1000))
        assert late.status_code == 504 and late.json()["error"]["message"] == "the answer took more than 0.4 s"
        with client.stream("POST", CHAT, json=chat(max_tokens=1000, stream=True)) as response:
            assert "timeout_error" in [line for line in response.iter_lines() if line][-1]
        until(lambda: decoder.ended == 2)
        assert said(client) == "w0 w1 w2 w3"


def test_large_bodies_are_not_read(tokenizer: Any) -> None:
    def chunks() -> Iterator[bytes]:
        yield from [b" " * 1000] * 10000

    with served(Scripted(), tokenizer, max_body=2000) as client:
        for content in (b" " * 10_000_000, chunks()):
            try:
                response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            except (httpx.WriteError, httpx.ReadError):  # the connection is closed while the client still writes
                continue
            assert response.status_code == 413 and "at most 2000 bytes" in response.json()["error"]["message"]
        assert said(client) == "w0 w1 w2 w3"


def test_with_a_key(tokenizer: Any) -> None:
    with served(Scripted(), tokenizer, key="s3cret") as client:
        for given in ("", "Bearer", "Bearer other", "Bearer s3cret2", "Bearer \xe4"):
            refused = client.post(CHAT, json=chat(), headers={"authorization": given.encode("latin-1")})
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == 401 and client.get("/health").status_code == 200
        accepted = client.post(CHAT, json=chat(), headers={"authorization": "Bearer s3cret"})
        assert accepted.status_code == 200


def test_many_connections(tokenizer: Any) -> None:
    with served(Scripted(), tokenizer, waiting=200) as client:
        done: list[str] = []
        threads = [threading.Thread(target=lambda: done.append(said(client))) for _ in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == ["w0 w1 w2 w3"] * 64


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2500:
        pytest.skip(f"a process may have {hard} open files here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2500), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_connections(tokenizer: Any, many_files: None) -> None:
    """Some of which say nothing, and some half of a request; of the others all are answered, or told to come back."""
    body = json.dumps(chat(max_tokens=4)).encode()
    head = ("Host: x", "Connection: close", "Content-Type: application/json", f"Content-Length: {len(body)}", "", "")
    whole = f"POST {CHAT} HTTP/1.1\r\n".encode() + "\r\n".join(head).encode() + body
    with served(Scripted(), tokenizer, waiting=8) as client:
        address = (client.base_url.host, client.base_url.port)
        sockets = [socket.create_connection(address, 60) for _ in range(1000)]
        try:
            for number, connection in enumerate(sockets):
                connection.sendall((b"", whole[:50], whole, whole)[number % 4])
            answers = [connection.makefile("rb").read() for n, connection in enumerate(sockets) if n % 4 > 1]
            assert said(client) == "w0 w1 w2 w3", "beside those that say nothing"
        finally:
            for connection in sockets:
                connection.close()
        found = Counter(answer.split()[1] for answer in answers)
        assert found[b"200"] + found[b"429"] == 500 and found[b"200"]
        assert said(client) == "w0 w1 w2 w3"


def test_the_command_ends_running_answers(tmp_path: Path) -> None:
    """SIGTERM: what is being answered is answered, and the command ends with 0."""
    save_model(tmp_path / "model", seed=1)
    command = [sys.executable, "-m", "cerberus_ext.cli", "serve", "--model", "model", "--heads", "none", "--port", "0"]
    environment = {**os.environ, "CERBERUS_API_KEY": "k"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"\[serving model at (http://127\.0\.0\.1:\d+)/v1\]\n", line)
        assert found, line
        body = {"model": "model", "prompt": "w3 w4", "max_tokens": 200, "stream": True, "temperature": 0}
        own = {"headers": {"authorization": "Bearer k"}, "trust_env": False}
        with httpx.stream("POST", f"{found[1]}{COMPLETIONS}", json=body, **own) as response:
            next(lines := response.iter_lines())
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken(tmp_path: Path, tokenizer: Any) -> None:
    save_model(tmp_path / "model", seed=1)
    with served(Scripted(), tokenizer) as client:
        command = [sys.executable, "-m", "cerberus_ext.cli", "serve", "--model", "model", "--heads", "none"]
        command += ["--port", str(client.base_url.port)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode != 0 and "address already in use" in done.stderr and "Traceback" not in done.stderr
