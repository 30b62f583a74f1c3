"""LangChain's ChatOpenAI, where it is installed, against the server."""

from __future__ import annotations

from typing import Any

import pytest
from serving_runs import served

from cerberus_ext import Decoder, decode

langchain: Any = pytest.importorskip("langchain_openai")


def test_chat(loaded: Any) -> None:
    model, tokenizer, alone = loaded

    def want(stop: str | None = None, **options: Any) -> str:
        new = decode(alone, None, [3 + 3, 3 + 4], max_new_tokens=16, **options).sequences[0, 2:]
        return str(tokenizer.decode(new, skip_special_tokens=True)).partition(stop or "\0")[0]

    with Decoder(model) as decoder, served(decoder, tokenizer, slots=3, key="k") as client:

        def chat(**options: Any) -> Any:
            url = f"{client.base_url}/v1"
            return langchain.ChatOpenAI(model="tiny", base_url=url, api_key="k", max_retries=0, **options)

        greedy = chat(temperature=0)
        answer = greedy.invoke("w3 w4")
        assert answer.content == want() and answer.usage_metadata["input_tokens"] == 2
        assert answer.response_metadata["finish_reason"] == "length"
        assert "".join(part.content for part in greedy.stream("w3 w4")) == want()
        stop = want().split()[4]
        assert greedy.invoke("w3 w4", stop=[stop]).content == want(stop)
        assert [a.content for a in greedy.batch(["w3 w4"] * 3)] == [want()] * 3
        assert chat(temperature=0.9, seed=5).invoke("w3 w4").content == want(temperature=0.9, seed=5)
        logged = chat(temperature=0, logprobs=True, top_logprobs=2).invoke("w3 w4")
        entries = logged.response_metadata["logprobs"]["content"]
        assert len(entries) == 16 and all(len(entry["top_logprobs"]) == 2 for entry in entries)
        with pytest.raises(Exception, match="tools: is not supported"):
            greedy.bind_tools([{"name": "f", "description": "f", "parameters": {}}]).invoke("w3 w4")
