"""What a client may send to do harm costs the others nothing that shows."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving_runs import CHAT, COMPLETIONS, Scripted, answered, chat, served, tiny, until
from tiny_chat import save_model
from typer.testing import CliRunner

from cerberus_ext import Decoder
from cerberus_ext.cli import app

JSON = {"content-type": "application/json"}
LONG = 1 << 20  # bytes of a body


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny(tmp_path_factory.mktemp("attacks"))[1]


@pytest.fixture(scope="module")
def client(tokenizer: Any) -> Iterator[httpx.Client]:
    with served(Scripted(), tokenizer, max_body=LONG, waiting=64) as client:
        yield client


def begun(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request, with this Content-Length or its own."""
    head = (f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {length or len(body)}")
    return "\r\n".join((*head, "Content-Type: application/json", "", "")).encode() + body


def said(client: httpx.Client) -> bool:
    """Others are answered as ever."""
    return str(answered(client, chat(max_tokens=4))["choices"][0]["message"]["content"]) == "w0 w1 w2 w3"


MESSAGE = '{"role":"user","content":"w3"}'


@pytest.mark.parametrize(
    ("path", "begin", "element", "end"),
    [
        (CHAT, '{"model":"tiny","messages":[', "3", "]}"),
        (CHAT, '{"model":"tiny","messages":[{"role":"user","content":[', "3", "]}]}"),
        (CHAT, f'{{"model":"tiny","messages":[{MESSAGE}],"stop":[', "3", "]}"),
        (CHAT, f'{{"model":"tiny","messages":[{MESSAGE}],', '"%d":3', "}"),
        (CHAT, f'{{"model":"tiny","messages":[{MESSAGE}],"stream_options":{{', '"%d":3', "}}"),
        (COMPLETIONS, '{"model":"tiny","prompt":[', "[-1]", "]}"),
        (COMPLETIONS, '{"model":"tiny","prompt":[', "-1", "]}"),
    ],
)
def test_a_megabyte_of_mistakes_is_refused_at_the_first(
    client: httpx.Client, path: str, begin: str, element: str, end: str
) -> None:
    """They were ten seconds of one error each, in which no other stream went on."""
    count = (LONG - 200) // (len(element) + 6)
    body = begin + ",".join(element % number if "%" in element else element for number in range(count)) + end
    start = time.perf_counter()
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 400 and len(response.text) < 400
    assert time.perf_counter() - start < 5  # 0.1 to 0.8 s where the machine is quiet
    assert said(client)


@pytest.mark.parametrize("name", ["w" * 100_000, "\ud800", "a.b", "a: b", "", "\0"])
def test_names_are_told_in_part(client: httpx.Client, name: str) -> None:
    response = client.post(CHAT, content=json.dumps({**chat(), name: 1}), headers=JSON)
    assert response.status_code == 400 and len(response.text) < 400


VALUES = """null true 0 -1 1.5 1e400 -1e400 NaN Infinity 9223372036854775807 9223372036854775808 -9223372036854775809
    "" "a" "\\u0000" "\\ud800" [] [null] [[]] {} {"a":1} ["a","\\ud800"] [true] [{"role":"user"}]
    [{"role":"user","content":null}] [{"role":"user","content":[]}] {"include_usage":"yes"}""".split()  # noqa: SIM905
VALUES += [
    "1" + "0" * 5000,
    "[" * 900 + "]" * 900,
    '{"a":' * 900 + "1" + "}" * 900,
    "[" * 100_000,
    '"%s"' % ("a" * 9999),
]
NAMES = """model messages prompt max_tokens max_completion_tokens temperature top_p top_k seed n stop stream
    stream_options logprobs top_logprobs logit_bias response_format tools user""".split()  # noqa: SIM905


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_any_value_of_any_field_is_answered_or_refused(loaded: Any, path: str) -> None:
    about = f'"messages":[{MESSAGE}]' if path == CHAT else '"prompt":"w3"'
    with Decoder(loaded[0]) as decoder, served(decoder, loaded[1], slots=3) as client:
        for name, value in product(NAMES, VALUES):
            body = f'{{"model":"tiny",{about},"max_tokens":3,"n":2,"{name}":{value}}}'
            response = client.post(path, content=body, headers=JSON)
            what = (name, value[:40], response.status_code, response.text[:200])
            assert response.status_code in (200, 400, 404), what
            if (name, value) == ("stream", "true"):
                assert response.text.endswith("data: [DONE]\n\n"), what
            elif response.status_code != 200:
                assert 0 < len(response.json()["error"]["message"]) < 300, what
        assert answered(client, chat())


def test_requests_one_behind_the_other(client: httpx.Client) -> None:
    body = json.dumps(chat(max_tokens=4)).encode()
    last = begun(CHAT, body).replace(b"Host: x", b"Host: x\r\nConnection: close")
    with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
        connection.sendall(begun(CHAT, body) * 2 + last)
        assert connection.makefile("rb").read().count(b"w0 w1 w2 w3") == 3


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01" + bytes(1000),
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: -3\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;" + b"a" * 500_000,
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: a\0b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 500_000,
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 100_000,
    ],
)
def test_what_is_no_request_ends_its_connection(client: httpx.Client, sent: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
        got = b""
        try:
            connection.sendall(sent)
            got = connection.makefile("rb").read()  # to the end
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert b" 200 " not in got and said(client)


def test_half_a_body_is_not_waited_for(tokenizer: Any) -> None:
    with served(Scripted(), tokenizer, timeout=0.5) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
            connection.sendall(begun(CHAT, b'{"model":', length=100))
            got = connection.makefile("rb").read()
        assert b"HTTP/1.1 408" in got and b"the body took more than 0.5 s" in got
        assert said(client)


def test_streams_that_are_cut_off_at_any_moment(tokenizer: Any) -> None:
    whole = json.dumps(chat(stream=True, max_tokens=200)).encode()
    decoder = Scripted(pause=0.002)
    with served(decoder, tokenizer, waiting=200, slots=4, positions=1 << 20) as client:

        def ask(number: int) -> None:
            draw = random.Random(number)
            with socket.create_connection((client.base_url.host, client.base_url.port), 20) as connection:
                if number % 2:  # RST in place of FIN
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(begun(CHAT, whole)[: draw.choice((None, 60, len(whole)))])
                time.sleep(draw.uniform(0, 0.5))

        threads = [threading.Thread(target=ask, args=[number]) for number in range(120)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        quiet = ("cerberus_running_requests 0.0", "cerberus_waiting_requests 0.0")
        until(lambda: all(line in client.get("/metrics").text for line in quiet))
        assert said(client)


@pytest.mark.parametrize("key", ["s\u00e9same", "\udcff\udcfe"])
def test_a_key_of_any_bytes(tokenizer: Any, key: str) -> None:
    """As the environment has it: undecodable bytes are surrogates."""
    with served(Scripted(), tokenizer, key=key) as client:
        right = client.get("/v1/models", headers={"authorization": b"Bearer " + os.fsencode(key)})
        assert right.status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 401


def test_the_command_ends_in_spite_of_clients_that_stop(tmp_path: Path) -> None:
    """One in the middle of a request, one that does not read its stream."""
    save_model(tmp_path / "model", seed=1)
    command = [sys.executable, "-m", "cerberus_ext.cli", "serve", "--model", "model", "--heads", "none", "--port", "0"]
    command += ["--timeout", "3"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert process.stderr is not None
        port = int(process.stderr.readline().split(":")[-1].partition("/")[0])
        with (
            socket.create_connection(("127.0.0.1", port), 20) as half,
            socket.create_connection(("127.0.0.1", port), 20) as deaf,
        ):
            half.sendall(begun(CHAT, b"{", length=100))
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            body = {"model": "model", "prompt": "w3", "max_tokens": 200, "stream": True, "n": 16, "logprobs": 5}
            deaf.sendall(begun(COMPLETIONS, json.dumps(body).encode()))
            assert deaf.recv(1)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("timeout", ["nan", "inf", "0", "1e9"])
def test_timeouts_that_are_none(timeout: str) -> None:
    result = CliRunner().invoke(app, ["serve", "--timeout", timeout])
    assert result.exit_code == 2 and "--timeout: must be in 1..1000000, got" in result.output
