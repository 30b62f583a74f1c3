"""A model that answers the prompts of a file, several at once; here, or as one of several replicas on a cluster."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

from ..engine.checks import eos_token_ids
from ..engine.decoder import Decoder
from ..io.words import Words
from .choice import Choice
from .engine import Engine, Refused
from .logprobs import Spellings
from .prompts import Prompts, positions_of

AHEAD = 2  # prompts per slot that an answerer has: one is decoded, the next one waits for its place
Q = TypeVar("Q")
A = TypeVar("A")


class Answerer:
    """Answers greedily, each prompt as `decode` would alone. A context manager: when it ends, the model is let go.

    load: makes model, tokenizer and heads, where the answerer is. slots: answers that are decoded at once; no more than
    AHEAD times as many may be asked for at a time. raw: prompts are given as they are, without the chat template.
    drafting: Decoder's options.
    """

    def __init__(
        self, load: Callable[[], tuple[Any, Any, Any]], slots: int, max_new_tokens: int, raw: bool, **drafting: Any
    ) -> None:
        model, self._tokenizer, heads = load()
        self._most, self._positions = max_new_tokens, positions_of(model)
        self._raw = raw or self._tokenizer.chat_template is None
        self._ends = eos_token_ids(None, model.generation_config)
        self._prompts, self._spellings = Prompts(self._tokenizer, self._positions), Spellings(self._tokenizer)
        self._decoder = Decoder(model, heads, **drafting)
        self._engine = Engine(self._decoder, AHEAD * slots, slots)
        self._engine.__enter__()

    async def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """question: {"id", "prompt": a text, or messages of a chat}.

        -> {"id", "answer", "finish_reason", "prompt_tokens", "completion_tokens"}, or {"id", "error"} for a prompt that
        cannot be answered.
        """
        prompt = question["prompt"]
        if isinstance(prompt, str) and not self._raw:
            prompt = [{"role": "user", "content": prompt}]
        try:
            ids = await self._prompts.encode(prompt)
            options = {"max_new_tokens": min(self._most, self._positions - ids.shape[1])}
            job = self._engine.submit(ids, options, math.inf)
            choice = Choice(job, Words(self._tokenizer), self._ends, self._spellings)
            async for _ in choice.pieces():
                pass
        except Refused as error:
            return {"id": question["id"], "error": str(error)}
        return {
            "id": question["id"],
            "answer": choice.text,
            "finish_reason": choice.finish,
            "prompt_tokens": ids.shape[1],
            "completion_tokens": choice.tokens,
        }

    def __enter__(self) -> Answerer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._engine.__exit__(*exception)
        self._decoder.close()


async def in_order(
    questions: Iterable[Q], workers: Sequence[Callable[[Q], Awaitable[A]]], each: int
) -> AsyncGenerator[A, None]:
    """The answers, in the order of the questions. Each worker has up to `each` of them at a time."""
    free: asyncio.Queue[Callable[[Q], Awaitable[A]]] = asyncio.Queue()
    for worker in [*workers] * each:
        free.put_nowait(worker)

    async def asked(worker: Callable[[Q], Awaitable[A]], question: Q) -> A:
        try:
            return await worker(question)
        finally:
            free.put_nowait(worker)

    tasks: deque[asyncio.Task[A]] = deque()
    try:
        for question in questions:
            tasks.append(asyncio.create_task(asked(await free.get(), question)))
            while tasks and tasks[0].done():
                yield tasks.popleft().result()
        while tasks:
            yield await tasks.popleft()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def one_by_one(answers: AsyncGenerator[A, None]) -> Generator[A, None, None]:
    """The same for a caller without an event loop."""
    loop = asyncio.new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(anext(answers))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(answers.aclose())
        loop.close()
