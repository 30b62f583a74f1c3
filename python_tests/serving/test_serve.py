"""The server's answers are those of `decode`, whole or in pieces; what it cannot do it refuses by name."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving_runs import CHAT, COMPLETIONS, answered, chat, events, served

from cerberus_ext import Decoder, decode


@pytest.fixture(scope="module")
def client(loaded: Any) -> Iterator[httpx.Client]:
    with Decoder(loaded[0]) as decoder, served(decoder, loaded[1], slots=3) as client:
        yield client


def told(loaded: Any, words: str, **options: Any) -> tuple[str, list[int]]:
    """What `decode` answers."""
    _, tokenizer, model = loaded  # not the server's own, which may be decoding
    ids = tokenizer(words, return_tensors="pt").input_ids
    tokens = decode(model, None, ids, **{"max_new_tokens": 16, **options}).sequences[0, ids.shape[1] :].tolist()
    return tokenizer.decode(tokens, skip_special_tokens=True), tokens


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.8, "seed": -3}, {"temperature": 1.5, "top_k": 5, "seed": 7}]
)
def test_a_chat_is_answered_as_decode_does(loaded: Any, client: httpx.Client, sampling: dict[str, Any]) -> None:
    got = answered(client, chat("w3 w4", **sampling))
    text, tokens = told(loaded, "w3 w4", **sampling)
    choice = got["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text}
    assert choice["finish_reason"] == ("stop" if tokens[-1] == 2 else "length")
    usage = got["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        2,
        len(tokens),
        2 + len(tokens),
    )
    assert got["object"] == "chat.completion" and got["model"] == "tiny" and got["id"].startswith("chatcmpl-")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_pieces_make_the_whole(client: httpx.Client, path: str) -> None:
    body = (
        chat(max_tokens=11)
        if path == CHAT
        else {"model": "tiny", "prompt": "w3 w4", "temperature": 0, "max_tokens": 11}
    )
    whole = answered(client, body, path)
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with client.stream("POST", path, json=streamed) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *parts, usage = events(response)
    choices = [part["choices"][0] for part in parts]
    content = [choice["delta"].get("content", "") if path == CHAT else choice["text"] for choice in choices]
    expected = whole["choices"][0]["message"]["content"] if path == CHAT else whole["choices"][0]["text"]
    assert "".join(content) == expected and len(content) > 3
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(parts) - 1) + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 11
    assert len({part["id"] for part in parts}) == 1
    if path == CHAT:
        assert choices[0]["delta"] == {"role": "assistant", "content": content[0]} and choices[-1]["delta"] == {}
        assert all("role" not in choice["delta"] for choice in choices[1:])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(loaded: Any, client: httpx.Client) -> None:
    """As users try a server first."""

    def said(body: dict[str, Any]) -> str:
        url = f"{client.base_url}{CHAT}"
        command = ["curl", "-sN", "--noproxy", "*", url, "-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    assert json.loads(said(chat()))["choices"][0]["message"]["content"] == told(loaded, "w3 w4")[0]
    lines = said(chat(stream=True)).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    parts = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines[:-2]]
    assert "".join(part.get("content", "") for part in parts) == told(loaded, "w3 w4")[0]


def test_stop_strings_end_the_answer_before_them(loaded: Any, client: httpx.Client) -> None:
    words = told(loaded, "w3 w4")[0].split()
    stop = " ".join(words[4:6])
    for stops in (stop, ["nowhere", stop]):
        got = answered(client, chat(stop=stops))
        assert got["choices"][0]["message"]["content"] == " ".join(words[:4]) + " "
        assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["completion_tokens"] == 6


def test_an_answer_may_have_no_text(loaded: Any, client: httpx.Client) -> None:
    words = next(words for i in range(60) if told(loaded, words := f"w{i}", max_new_tokens=1)[1] == [2])
    choice = answered(client, chat(words))["choices"][0]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "stop"
    with client.stream("POST", CHAT, json=chat(words, stream=True)) as response:
        first, last = [part["choices"][0] for part in events(response)]
    assert first["delta"] == {"role": "assistant", "content": ""} and last["finish_reason"] == "stop"


def test_n_answers_have_seeds_one_after_the_other(loaded: Any, client: httpx.Client) -> None:
    got = answered(client, chat(temperature=1.0, seed=5, n=3))
    texts = [told(loaded, "w3 w4", temperature=1.0, seed=5 + number)[0] for number in range(3)]
    assert [choice["message"]["content"] for choice in got["choices"]] == texts and len(set(texts)) == 3
    assert [choice["index"] for choice in got["choices"]] == [0, 1, 2]
    with client.stream("POST", CHAT, json=chat(temperature=1.0, seed=5, n=3, stream=True)) as response:
        parts = [part["choices"][0] for part in events(response)]
    for number, text in enumerate(texts):
        assert "".join(part["delta"].get("content", "") for part in parts if part["index"] == number) == text


def test_answers_that_come_and_go(loaded: Any, client: httpx.Client) -> None:
    """More requests than slots, of several lengths: each answer is that of its prompt and seed alone."""
    asked = [{"max_tokens": 3 + 5 * (seed % 4), "temperature": float(seed % 2), "seed": seed} for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda options: answered(client, chat("w3 w4", **options)), asked))
    for options, result in zip(asked, got, strict=True):
        want = told(loaded, "w3 w4", max_new_tokens=options.pop("max_tokens"), **options)[0]
        assert result["choices"][0]["message"]["content"] == want


def test_a_client_that_goes_away_disturbs_no_other(loaded: Any, client: httpx.Client) -> None:
    with ThreadPoolExecutor(2) as pool:
        for seed in range(6):
            options = {"temperature": 1.0, "seed": seed, "max_tokens": 40}
            stays = pool.submit(answered, client, chat("w3 w4", **options))
            with client.stream("POST", CHAT, json=chat("w5", stream=True, max_tokens=200)) as response:
                next(response.iter_lines())
            want = told(loaded, "w3 w4", temperature=1.0, seed=seed, max_new_tokens=40)[0]
            assert stays.result()["choices"][0]["message"]["content"] == want


def test_prompts_as_texts_and_as_tokens(loaded: Any, client: httpx.Client) -> None:
    want = [told(loaded, words)[0] for words in ("w3 w4", "w5 w6 w7")]
    ids = [loaded[1](words).input_ids for words in ("w3 w4", "w5 w6 w7")]
    for prompt in (["w3 w4", "w5 w6 w7"], ids):
        got = answered(client, {"model": "tiny", "prompt": prompt, "temperature": 0}, COMPLETIONS)
        assert [choice["text"] for choice in got["choices"]] == want and got["usage"]["prompt_tokens"] == 5
    assert (
        answered(client, {"model": "tiny", "prompt": ids[0], "temperature": 0}, COMPLETIONS)["choices"][0]["text"]
        == want[0]
    )


def test_parts_of_a_message_and_newer_names(loaded: Any, client: httpx.Client) -> None:
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]
    body = {**chat(), "messages": [{"role": "user", "content": parts, "name": "me"}], "max_completion_tokens": 5}
    assert answered(client, body)["choices"][0]["message"]["content"] == told(loaded, "w3 w4", max_new_tokens=5)[0]
    harmless = {"user": "me", "store": False, "metadata": {}, "logit_bias": None, "tools": [], "logprobs": False}
    assert answered(client, chat(**harmless))["choices"][0]["message"]["content"] == told(loaded, "w3 w4")[0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 2**63}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 255}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "w3"}, "messages"),
        ({"messages": [{"role": "poet", "content": "w3"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"more": 1}}, "stream_options"),
        ({"model": 3}, "model"),
    ],
)
def test_what_is_refused_is_named(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    content = repr({**chat(), **change})  # JSON, but for its NaN
    for python, own in (("'", '"'), ("True", "true"), ("nan", "NaN")):
        content = content.replace(python, own)
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0] == param and error["message"].startswith(param)


def test_other_requests_are_refused(client: httpx.Client) -> None:
    assert client.post(CHAT, json=chat(model="other")).json()["error"]["code"] == "model_not_found"
    for content in (b"{", b"[]", b"\xff", b"", b"null"):
        response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
        error = response.json()["error"]
        assert (
            response.status_code == 400
            and error["type"] == "invalid_request_error"
            and error["param"] in ("body", None)
        )
    assert client.get("/v1/none").status_code == 404 and client.get(CHAT).status_code == 405
    long = client.post(COMPLETIONS, json={"model": "tiny", "prompt": [3] * 256})
    assert long.status_code == 400 and "1 to 255 tokens, got 256" in long.json()["error"]["message"]
    unknown = client.post(COMPLETIONS, json={"model": "tiny", "prompt": [64000]})
    assert unknown.status_code == 400 and "ids must be in 0..63" in unknown.json()["error"]["message"]
    for prompt in ("", [], [[]], [[3], []], ["w3", ""], [10**30], [[10**30]], [-1], [True], ["w3", [3]], [3.5]):
        refused = client.post(COMPLETIONS, json={"model": "tiny", "prompt": prompt})
        assert refused.status_code == 400 and "prompt" in refused.json()["error"]["message"]


@pytest.mark.parametrize("words", ["\ud800 w3", "w3 \udfff"])
def test_half_a_character_is_refused(client: httpx.Client, words: str) -> None:
    for path, body in ((CHAT, chat(words)), (COMPLETIONS, {"model": "tiny", "prompt": ["w3", words]})):
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert response.status_code == 400
        assert "the prompt must be text, got '\\ud" in response.json()["error"]["message"]


def test_models_health_and_metrics(loaded: Any, client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny"]
    assert client.get("/v1/models/tiny").json()["object"] == "model" and client.get("/v1/models/x").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}

    def metric(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    names = ["cerberus_generated_tokens_total", "cerberus_prompt_tokens_total", "cerberus_first_token_seconds_count"]
    before = [metric(name) for name in names]
    tokens = answered(client, chat("w3 w4"))["usage"]["completion_tokens"]
    assert [metric(name) - old for name, old in zip(names, before, strict=True)] == [tokens, 2, 1]


def test_without_a_chat_template_messages_are_refused(loaded: Any) -> None:
    model, tokenizer, _ = loaded
    tokenizer.chat_template = None
    with Decoder(model) as decoder, served(decoder, tokenizer) as client:
        response = client.post(CHAT, json=chat())
    assert response.status_code == 400 and "no chat template" in response.json()["error"]["message"]
