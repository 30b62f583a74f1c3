"""How many tokens a second a server with OpenAI's interface gives, and how long clients wait for them.

    cerberus serve &
    python bench/serving.py --questions mt_bench.jsonl --concurrency 1 4 16 --out serving.json

So many clients ask at a time, each its next question when the last one is answered; answers are of mixed lengths,
greedy, and streamed. --check: every answer is compared with that of `decode` alone, in this process. --url, --model:
another server's, llama.cpp's say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent / "shared"))
import machine  # noqa: E402

LENGTHS = (16, 48, 96, 160)  # tokens of answers, in turns


@dataclass
class Asked:
    """One request. times: when each piece came, from the request on, in seconds."""

    prompt: str
    tokens: int
    text: str = ""
    times: list[float] = field(default_factory=list)
    completion: int = 0
    error: str | None = None


async def ask(client: httpx.AsyncClient, model: str, asked: Asked) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": asked.prompt}],
        "max_tokens": asked.tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = time.perf_counter()
    async with client.stream("POST", "chat/completions", json=body) as response:
        if response.status_code != 200:
            asked.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            return
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                asked.error = event["error"]["message"]
            for choice in event.get("choices", ()):
                if piece := choice["delta"].get("content"):
                    asked.text += piece
                    asked.times.append(time.perf_counter() - begin)
            if event.get("usage"):
                asked.completion = event["usage"]["completion_tokens"]


async def load(url: str, model: str, requests: list[Asked], concurrency: int) -> float:
    """Seconds until all are answered."""
    rest = iter(requests)

    async def client() -> None:
        for asked in rest:
            await ask(session, model, asked)

    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return time.perf_counter() - begin


def requests_of(questions: Path, count: int) -> Iterator[Asked]:
    turns = [json.loads(line)["turns"][0] for line in questions.read_text().splitlines()]
    for number in range(count):
        yield Asked(turns[number % len(turns)], LENGTHS[number % len(LENGTHS)])


def summary(requests: list[Asked], seconds: float, concurrency: int) -> dict[str, Any]:
    """Milliseconds, where nothing else is said."""
    between = [b - a for asked in requests for a, b in zip(asked.times, asked.times[1:], strict=False)]
    first = [asked.times[0] for asked in requests if asked.times]
    half, most = (lambda values: quantiles(values, n=20)[9] * 1e3), (lambda values: quantiles(values, n=20)[18] * 1e3)
    return {
        "concurrency": concurrency,
        "requests": len(requests),
        "errors": sum(asked.error is not None for asked in requests),
        "tokens_per_second": sum(asked.completion for asked in requests) / seconds,
        "first_token": {"p50": half(first), "p95": most(first)},
        "between_pieces": {"p50": half(between), "p95": most(between)},
    }


def differing(requests: list[Asked]) -> int:
    """How many answers are not those of `decode` alone."""
    import cerberus_ext
    from cerberus_ext.io.prompts import encode_chat

    model, tokenizer = cerberus_ext.load_default_model()
    known: dict[tuple[str, int], str] = {}
    with cerberus_ext.Decoder(model) as decoder:
        for asked in requests:
            if (key := (asked.prompt, asked.tokens)) not in known:
                ids = encode_chat(tokenizer, [asked.prompt])
                tokens = decoder.decode(ids, max_new_tokens=asked.tokens).sequences[0, ids.shape[1] :]
                known[key] = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return sum(asked.text != known[asked.prompt, asked.tokens] for asked in requests)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1/")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    rows, wrong = [], 0
    for concurrency in arguments.concurrency:
        requests = list(requests_of(arguments.questions, arguments.requests))
        seconds = asyncio.run(load(arguments.url, arguments.model, requests, concurrency))
        row = summary(requests, seconds, concurrency)
        if arguments.check:
            row["differ"] = differing(requests)
        wrong += row["errors"] + row.get("differ", 0)
        rows.append(row)
        print(row, flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"machine": machine.describe(), "url": arguments.url, "rows": rows}, indent=1)
        )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
