"""Whether a server's memory stays flat: minutes of requests of all kinds, and what it has resident at the end of each.

    python bench/soak.py --minutes 30 --out soak.json -- --model FOLDER --heads none

What follows -- are arguments of `cerberus serve`. So many clients at a time ask for whole answers and for streams,
sampled, with stop strings and log-probabilities; they leave in the middle, and send what is refused. Prompts are
tokens, so that any model will do. Status 1 where a request gets another answer than it should, or where memory has
grown by more than 2 % from the first half of the minutes to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent / "shared"))
import machine  # noqa: E402
from servers import Server, ours, resident  # noqa: E402

MOST_GROWTH = 1.02


async def ask(client: httpx.AsyncClient, model: str, draw: random.Random) -> None:
    """One request. Raises AssertionError where its answer is not as it should be."""
    kind = draw.choice(("whole", "whole", "stream", "leaves", "refused", "not JSON"))
    body: dict[str, Any] = {
        "model": model,
        "prompt": [draw.randrange(3, 60) for _ in range(draw.choice((1, 10, 60)))],
        "max_tokens": draw.choice((1, 10, 60)),
        "temperature": draw.choice((0, 0.8)),
        "seed": draw.randrange(1000),
        "n": draw.choice((1, 1, 2)),
        "stop": draw.choice((None, ["7"])),
        "logprobs": draw.choice((None, None, 3)),
    }
    if kind in ("stream", "leaves"):
        async with client.stream("POST", "completions", json={**body, "stream": True}) as response:
            assert response.status_code == 200, response.status_code
            async for _ in response.aiter_lines():
                if kind == "leaves":
                    break
    elif kind == "not JSON":
        assert (await client.post("completions", content=b"{" * draw.randrange(1, 9999))).status_code == 400
    else:
        refused = {"tools": [{"type": "function"}]} if kind == "refused" else {}
        response = await client.post("completions", json={**body, **refused})
        assert response.status_code == (400 if refused else 200), response.text


async def soak(server: Server, minutes: int, clients: int) -> list[dict[str, Any]]:
    """Of the end of each minute."""
    begin, found, asked = time.monotonic(), list[dict[str, Any]](), 0

    async def go_on(number: int) -> None:
        nonlocal asked
        draw = random.Random(number)
        while time.monotonic() < begin + 60 * minutes:
            await ask(session, server.model, draw)
            asked += 1

    async def watch() -> None:
        for minute in range(1, minutes + 1):
            await asyncio.sleep(begin + 60 * minute - time.monotonic())
            found.append({"minute": minute, "requests": asked, "resident": resident(server.pid) / 1e6})
            print("minute {minute}: {resident:.1f} MB after {requests} requests".format(**found[-1]), flush=True)

    async with httpx.AsyncClient(base_url=server.url, timeout=None, trust_env=False) as session:
        await asyncio.gather(watch(), *(go_on(number) for number in range(clients)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON; MB of resident memory")
    parser.add_argument("serve", nargs="*", help="arguments of cerberus serve")
    arguments = parser.parse_args()
    with ours(*arguments.serve) as server:
        found = asyncio.run(soak(server, arguments.minutes, arguments.clients))
    if arguments.out:
        result = {"machine": machine.describe(), "serve": arguments.serve, "clients": arguments.clients, "rows": found}
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    first = found[: (len(found) + 1) // 2]
    return int(found[-1]["resident"] > MOST_GROWTH * max(row["resident"] for row in first))


if __name__ == "__main__":
    sys.exit(main())
