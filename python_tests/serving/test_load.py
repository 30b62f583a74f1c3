"""Under load no request fails, and every answer is that of `decode` alone with its seed."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import httpx
import pytest
from serving_runs import COMPLETIONS, served

from cerberus_ext import Decoder, decode

COUNT = 200


def asked(number: int) -> dict[str, Any]:
    """Prompts of 1 to 60 tokens, answers of 1 to 80, greedy and sampled."""
    draw = random.Random(number)
    prompt = [draw.randrange(3, 60) for _ in range(draw.choice((1, 5, 20, 60)))]
    sampling = {"temperature": draw.choice((0.0, 0.7)), "seed": number % 7}
    return {"model": "tiny", "prompt": prompt, "max_tokens": draw.choice((1, 8, 30, 80)), **sampling}


def answer(client: httpx.Client, number: int) -> str:
    """Every second one as a stream."""
    body = {**asked(number), "stream": number % 2 == 1}
    response = client.post(COMPLETIONS, json=body)
    assert response.status_code == 200, response.text
    if not body["stream"]:
        return str(response.json()["choices"][0]["text"])
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines)


@pytest.mark.slow
def test_every_answer_is_that_of_decode(loaded: Any) -> None:
    model, tokenizer, alone = loaded

    @cache
    def want(number: int) -> str:
        body = asked(number)
        prompt, most = body.pop("prompt"), body.pop("max_tokens")
        new = decode(alone, None, prompt, max_new_tokens=most, **{n: body[n] for n in ("temperature", "seed")})
        return str(tokenizer.decode(new.sequences[0, len(prompt) :], skip_special_tokens=True))

    for concurrency in (1, 4, 16):
        with (
            Decoder(model) as decoder,
            served(decoder, tokenizer, waiting=16, slots=5) as client,
            ThreadPoolExecutor(concurrency) as pool,
        ):
            got = list(pool.map(lambda number: answer(client, number), range(COUNT)))  # noqa: B023
        assert [number for number in range(COUNT) if got[number] != want(number)] == []
