"""How many tokens a second a server with OpenAI's interface gives, and how long clients wait for them.

    python bench/serving.py --questions mt_bench.jsonl --concurrency 1 4 16 --llama-cpp PYTHON --out serving.json

Starts `cerberus serve` with and without drafts and, with --llama-cpp, a Python that has xllamacpp, llama.cpp's server
with the same file of weights in four bits (Q4_1); they take turns, a part of the requests at a time. So many clients
ask at a time, each its next question when the last one is answered; answers are of mixed lengths, greedy, and streamed.
--check: every answer of ours is compared with that of `decode` alone, in this process. --url, --model: a server that
runs already.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent / "shared"))
import machine  # noqa: E402
from servers import Server, llama_cpp, ours  # noqa: E402

import cerberus_ext  # noqa: E402
from cerberus_ext.io.prompts import encode_chat  # noqa: E402

LENGTHS = (16, 48, 96, 160)  # tokens of answers, in turns
PARTS = 5  # of the requests, every fifth each, so that there are all lengths in them: a server's turns
CONTEXT = 2048  # tokens of a slot of llama.cpp's
LLAMA_CPP = "llama.cpp, Q4_1"


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

    # llama.cpp's server may close a connection just as the next request is on its way: each request has its own.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as session:
        begin = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return time.perf_counter() - begin


def requests_of(questions: Path, count: int) -> list[Asked]:
    turns = [json.loads(line)["turns"][0] for line in questions.read_text().splitlines()]
    return [Asked(turns[number % len(turns)], LENGTHS[number % len(LENGTHS)]) for number in range(count)]


def measured(
    servers: dict[str, Server], requests: list[Asked], concurrency: int
) -> dict[str, tuple[list[Asked], float]]:
    """By server: the requests, answered, and the seconds that they took in all. They take turns."""
    done: dict[str, tuple[list[Asked], float]] = {name: ([], 0.0) for name in servers}
    for part in range(PARTS):
        for name in [*servers][part % len(servers) :] + [*servers][: part % len(servers)]:
            asked = deepcopy(requests[part::PARTS])
            seconds = asyncio.run(load(servers[name].url, servers[name].model, asked, concurrency))
            done[name] = (done[name][0] + asked, done[name][1] + seconds)
    return done


def summary(name: str, requests: list[Asked], seconds: float, concurrency: int) -> dict[str, Any]:
    """Milliseconds, where nothing else is said.

    between_pieces: from one piece of a stream to the next, of one token or several; per_token_of_an_answer: its time
    behind the first piece, over its tokens.
    """
    first = [asked.times[0] for asked in requests if asked.times]
    pieces = [b - a for asked in requests for a, b in zip(asked.times, asked.times[1:], strict=False)]
    tokens = [
        (asked.times[-1] - asked.times[0]) / (asked.completion - 1)
        for asked in requests
        if asked.completion > 1 and asked.times
    ]
    return {
        "server": name,
        "concurrency": concurrency,
        "requests": len(requests),
        "errors": sum(asked.error is not None for asked in requests),
        "tokens_per_second": sum(asked.completion for asked in requests) / seconds,
        "first_token": percentiles(first),
        "between_pieces": percentiles(pieces),
        "per_token_of_an_answer": percentiles(tokens),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = quantiles(seconds, n=20)
    return {"p50": cuts[9] * 1e3, "p95": cuts[18] * 1e3}


class Alone:
    """`decode` in this process."""

    def __init__(self) -> None:
        self._model, self._tokenizer = cerberus_ext.load_default_model()
        self._known: dict[tuple[str, int], str] = {}

    def differing(self, requests: list[Asked]) -> int:
        """How many answers are others than these."""
        return sum(asked.text != self._answer(asked.prompt, asked.tokens) for asked in requests)

    def _answer(self, prompt: str, tokens: int) -> str:
        if (prompt, tokens) not in self._known:
            ids = encode_chat(self._tokenizer, [prompt])
            new = cerberus_ext.decode(self._model, None, ids, max_new_tokens=tokens).sequences[0, ids.shape[1] :]
            self._known[prompt, tokens] = str(self._tokenizer.decode(new, skip_special_tokens=True))
        return self._known[prompt, tokens]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="of a server that runs, instead of those that this starts")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="of that server")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with turns")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    requests, rows, wrong = requests_of(arguments.questions, arguments.requests), [], 0
    with ExitStack() as stack:
        servers = servers_of(arguments, stack)
        measured(servers, requests[:PARTS], 1)  # warms up
        alone = Alone() if arguments.check else None
        for concurrency in arguments.concurrency:
            for name, (asked, seconds) in measured(servers, requests, concurrency).items():
                row = summary(name, asked, seconds, concurrency)
                if alone is not None and name != LLAMA_CPP:
                    row["differ"] = alone.differing(asked)
                wrong += row["errors"] + row.get("differ", 0)
                rows.append(row)
                print(json.dumps(row), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1))
    return int(wrong > 0)


def servers_of(arguments: argparse.Namespace, stack: ExitStack) -> dict[str, Server]:
    """By name. They end with the stack."""
    if arguments.url:
        return {arguments.url: Server(arguments.url, arguments.model)}
    slots = ["--slots", str(arguments.slots)]
    found = {"drafts": stack.enter_context(ours(*slots)), "plain": stack.enter_context(ours("--no-drafts", *slots))}
    if arguments.llama_cpp:
        found[LLAMA_CPP] = stack.enter_context(llama_cpp(arguments.llama_cpp, arguments.slots, CONTEXT))
    return found


if __name__ == "__main__":
    sys.exit(main())
