"""OpenAI's own client, where it is installed, against the server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from serving_runs import served

from cerberus_ext import Decoder, decode

openai: Any = pytest.importorskip("openai")
QUESTION: Any = [{"role": "user", "content": "w3 w4"}]


@pytest.fixture(scope="module")
def url(loaded: Any) -> Iterator[str]:
    with Decoder(loaded[0]) as decoder, served(decoder, loaded[1], slots=3, key="k") as client:
        yield f"{client.base_url}/v1"


def want(loaded: Any, **options: Any) -> str:
    _, tokenizer, model = loaded  # not the server's own, which may be decoding
    sequences = decode(model, None, [3 + 3, 3 + 4], max_new_tokens=16, **options).sequences
    return str(tokenizer.decode(sequences[0, 2:], skip_special_tokens=True))


def test_whole_and_in_pieces(loaded: Any, url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        chat = client.chat.completions
        whole = chat.create(model="tiny", messages=QUESTION, temperature=0.7, seed=3)
        assert whole.choices[0].message.content == want(loaded, temperature=0.7, seed=3)
        details = whole.usage.completion_tokens_details
        assert details.accepted_prediction_tokens + details.rejected_prediction_tokens >= 0
        parts = list(chat.create(model="tiny", messages=QUESTION, temperature=0, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts) == want(loaded)
        text = client.completions.create(model="tiny", prompt="w3 w4", temperature=0)
        assert text.choices[0].text == want(loaded)


def test_errors(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
        chat = client.chat.completions
        with pytest.raises(openai.BadRequestError, match="tools: is not supported"):
            chat.create(model="tiny", messages=QUESTION, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.NotFoundError, match="there is only 'tiny'"):
            chat.create(model="other", messages=QUESTION)
    with (
        openai.OpenAI(base_url=url, api_key="other", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.models.list()


def test_at_the_same_time(loaded: Any, url: str) -> None:
    async def ask(client: Any, seed: int) -> str:
        stream = await client.chat.completions.create(
            model="tiny", messages=QUESTION, temperature=1.0, seed=seed, stream=True
        )
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key="k") as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(6)))

    assert asyncio.run(all_of_them()) == [want(loaded, temperature=1.0, seed=seed) for seed in range(6)]
