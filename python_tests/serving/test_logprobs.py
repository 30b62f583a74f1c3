"""Log-probabilities are transformers' own, for every token of an accepted block, whole and in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from serving_runs import CHAT, COMPLETIONS, answered, chat, events, served

from cerberus_ext import Decoder
from cerberus_ext.serving.logprobs import Entry, Logprobs, Spelling, Spellings, of_completion

PROMPT = "w5 w5"  # is answered at length, with drafts that are right


@pytest.fixture(scope="module")
def client(loaded: Any) -> Iterator[httpx.Client]:
    with Decoder(loaded[0]) as decoder, served(decoder, loaded[1], slots=3, waiting=32) as client:
        yield client


def expected(loaded: Any, tokens: list[int], prompt: str = PROMPT) -> torch.Tensor:
    """(new tokens, V): of the model itself, read in one forward."""
    _, tokenizer, model = loaded
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(torch.cat([ids, torch.tensor([tokens])], 1)).logits[0, ids.shape[1] - 1 : -1]
    return logits.float().log_softmax(-1)


def check(loaded: Any, entries: list[Any], top: int) -> None:
    tokens = [loaded[1].convert_tokens_to_ids(entry["token"].strip()) for entry in entries]
    for entry, token, row in zip(entries, tokens, expected(loaded, tokens), strict=True):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-4)
        assert bytes(entry["bytes"]).decode() == entry["token"]
        best = row.topk(top)
        others = entry["top_logprobs"]
        assert [other["logprob"] for other in others] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [loaded[1].convert_tokens_to_ids(o["token"].strip()) for o in others] == best.indices.tolist()


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.9, "seed": 4}])
def test_of_a_chat(loaded: Any, client: httpx.Client, sampling: dict[str, Any]) -> None:
    body = chat(PROMPT, max_tokens=60, **sampling)
    plain, got = answered(client, body), answered(client, {**body, "logprobs": True, "top_logprobs": 4})
    choice = got["choices"][0]
    assert choice["message"] == plain["choices"][0]["message"] and plain["choices"][0]["logprobs"] is None
    if not sampling:
        assert got["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 3  # there were blocks
    entries = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries).strip() == choice["message"]["content"].strip()
    check(loaded, entries, 4)
    with client.stream("POST", CHAT, json={**body, "logprobs": True, "top_logprobs": 4, "stream": True}) as response:
        parts = [part["choices"][0] for part in events(response)]
    assert [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == entries
    assert parts[-1]["logprobs"] is None
    none = answered(client, {**body, "logprobs": True})["choices"][0]["logprobs"]["content"]
    assert none == [{**entry, "top_logprobs": []} for entry in entries]


def test_several_at_once(loaded: Any, client: httpx.Client) -> None:
    got = answered(client, chat(PROMPT, n=4, temperature=1.0, seed=1, logprobs=True, top_logprobs=20))
    for choice in got["choices"]:
        check(loaded, choice["logprobs"]["content"], 20)


def test_of_a_completion(loaded: Any, client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12}
    chat_entries = answered(client, chat(PROMPT, max_tokens=12, logprobs=True, top_logprobs=2))
    entries = chat_entries["choices"][0]["logprobs"]["content"]
    choice = answered(client, {**body, "logprobs": 2}, COMPLETIONS)["choices"][0]
    found = choice["logprobs"]
    assert found["tokens"] == [entry["token"] for entry in entries]
    assert found["token_logprobs"] == pytest.approx([entry["logprob"] for entry in entries], abs=1e-6)
    assert [list(best) for best in found["top_logprobs"]] == [
        [other["token"] for other in entry["top_logprobs"]] for entry in entries
    ]
    words = choice["text"].split()
    assert [choice["text"][place:].split()[0] for place in found["text_offset"]] == words
    alone = answered(client, {**body, "logprobs": 0}, COMPLETIONS)["choices"][0]["logprobs"]
    assert [list(best) for best in alone["top_logprobs"]] == [[token] for token in found["tokens"]]


def test_stops_have_none(client: httpx.Client) -> None:
    """As many entries as there are words before the stop string, and none for the token that ends a text."""
    words = answered(client, chat("w3 w4"))["choices"][0]["message"]["content"].split()
    body = chat("w3 w4", stop=f" {words[4]} {words[5]}", logprobs=True)
    choice = answered(client, body)["choices"][0]
    assert [entry["token"].strip() for entry in choice["logprobs"]["content"]] == words[:4]
    with client.stream("POST", CHAT, json={**body, "stream": True}) as response:
        parts = [part["choices"][0] for part in events(response)]
    assert [entry for part in parts if part["logprobs"] for entry in part["logprobs"]["content"]] == (
        choice["logprobs"]["content"]
    )
    got = answered(client, chat("w3", n=16, temperature=2.0, seed=0, max_tokens=100, logprobs=True))["choices"]
    ended = [choice for choice in got if choice["finish_reason"] == "stop"]
    assert ended and all("</s>" not in [e["token"].strip() for e in c["logprobs"]["content"]] for c in ended)


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        (CHAT, {"top_logprobs": 3}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"logprobs": 3}, "logprobs"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs"),
        (COMPLETIONS, {"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_refused(client: httpx.Client, path: str, change: dict[str, Any], param: str) -> None:
    body = chat() if path == CHAT else {"model": "tiny", "prompt": "w3"}
    response = client.post(path, json={**body, **change})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_how_tokens_read() -> None:
    tokenizer = byte_tokenizer(256)
    spellings = Spellings(tokenizer)
    for text in ("a", " ", "é", "\n", "\U0001f600"):
        found = [spellings.of(token) for token in tokenizer.encode(text, add_special_tokens=False)]
        assert b"".join(bytes(spelling.bytes or ()) for spelling in found) == text.encode()


def test_parts_of_a_character_have_names_of_their_own() -> None:
    tokenizer = byte_tokenizer(256)
    spellings = Spellings(tokenizer)
    found = [spellings.of(token) for token in tokenizer.encode("é", add_special_tokens=False)]
    assert [spelling.text for spelling in found] == ["\ufffd", "\ufffd"]
    best = [
        (spelling, -1.0 - place) for place, spelling in enumerate([*found, spellings.of(tokenizer.encode("a")[-1])])
    ]
    got = of_completion([Entry(0, best[0], best), Entry(0, best[1], best), Entry(1, best[2], [])])
    first, second = "bytes:\\xc3", "bytes:\\xa9"
    assert got["tokens"] == [first, second, "a"]
    assert got["top_logprobs"] == [{first: -1.0, second: -2.0, "a": -3.0}] * 2 + [{"a": -3.0}]
    assert Spelling("\ufffd", None).name == "\ufffd"


def test_what_is_forbidden_is_a_number_in_json() -> None:
    logprobs = Logprobs(3)
    logprobs(torch.tensor([[0]]), torch.tensor([[0.0, -torch.inf, 0.0]]))
    logprobs(torch.tensor([[0]]), torch.zeros(1, 3))  # chosen behind the text's end
    logprobs.take([1])
    assert logprobs.found[0][0] == (1, -9999.0) and logprobs.found[0][3] == (1, -9999.0) and len(logprobs.found) == 1
