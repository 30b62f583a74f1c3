"""The routes of the server: OpenAI's, /health and /metrics."""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from ..io.words import Words
from .answers import CHAT, COMPLETION, Answer, Kind, error
from .choice import Choice, Piece
from .engine import Busy, Engine, Refused
from .limits import BodyLimit
from .logprobs import Logprobs, Spellings
from .metrics import Metrics
from .prompts import Prompts
from .requests import ChatRequest, CompletionRequest
from .requests import Request as Asked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R")
RETRY_AFTER = 1  # seconds


@dataclass(frozen=True)
class Settings:
    """Of a server.

    model: as clients name it. positions: tokens that a prompt and its answer may have together. max_new_tokens: where a
    client does not say. ends: the tokens that end a text. key: that clients have to send, as the environment has it;
    "": none. timeout: seconds that a request may take, waiting included. max_body: bytes.
    """

    model: str
    positions: int
    max_new_tokens: int
    ends: frozenset[int]
    key: str = ""
    timeout: float = 600.0
    max_body: int = 1 << 20


class Refusal(HTTPException):
    """An error in OpenAI's form."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, error(message, KINDS.get(status, "invalid_request_error"), param, code))


KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}


class Server:
    """What the routes share."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.settings = settings
        self.metrics = Metrics(engine)
        self.prompts = Prompts(tokenizer, settings.positions)
        self._engine = engine
        self._tokenizer = tokenizer
        self._spellings = Spellings(tokenizer)

    async def answer(self, kind: Kind, request: Request, asked: Asked, prompts: Sequence[Any]) -> Any:
        """prompts: messages of a chat, a text, or tokens, each of which gets n answers."""
        if asked.model != self.settings.model:
            raise Refusal(404, f"model: there is only {self.settings.model!r}", "model", "model_not_found")
        if (count := asked.n * len(prompts)) > (most := self._engine.most_waiting):
            raise Refusal(400, f"n: {count} answers are more than the {most} that may wait", "n")
        begin = time.perf_counter()
        choices: list[Choice] = []
        try:
            for tokens in [await self.prompts.encode(prompt) for prompt in prompts]:
                choices += [self._choice(asked, tokens, number) for number in range(asked.n)]
            answer = Answer(kind, asked.model, choices)
            pieces = choices[0].pieces()
            first = await _unless_gone(request, anext(pieces, Piece()))
            self.metrics.first.observe(time.perf_counter() - begin)
            if not asked.stream:
                await _unless_gone(request, _rest(pieces, choices))
        except BaseException as raised:
            self._end(choices, "failed")
            raise _refusal(raised, self.settings.timeout) from raised
        if asked.stream:
            parts = self._parts(answer, first, pieces, asked.stream_options.include_usage)
            return StreamingResponse(parts, media_type="text/event-stream")
        self._end(choices, "answered")
        return answer.whole()

    def _choice(self, asked: Asked, ids: Any, number: int) -> Choice:
        room = self.settings.positions - ids.shape[1]
        most = min(room, self.settings.max_new_tokens) if asked.max_tokens is None else asked.max_tokens
        if most > room:
            raise Refusal(
                400,
                f"max_tokens: {most} and a prompt of {ids.shape[1]} tokens are more than the model's"
                f" {self.settings.positions} positions",
                "max_tokens",
                "context_length_exceeded",
            )
        options = {**asked.options(number), "max_new_tokens": most}
        logprobs = None if asked.top is None else Logprobs(asked.top)
        job = self._engine.submit(ids, options, self.settings.timeout, logprobs)
        return Choice(job, Words(self._tokenizer, asked.stop), self.settings.ends, self._spellings)

    async def _parts(
        self, answer: Answer, first: Piece, pieces: AsyncIterator[Piece], with_usage: bool
    ) -> AsyncIterator[str]:
        """The events of a stream, of which the first piece of the first choice is there already."""
        status = "failed"
        try:
            for index, choice in enumerate(answer.choices):
                yield _event(answer.part(index, first if index == 0 else Piece(), begins=True))
                async for piece in pieces if index == 0 else choice.pieces():
                    yield _event(answer.part(index, piece))
                yield _event(answer.last_part(index))
            if with_usage:
                yield _event(answer.usage_part())
            yield "data: [DONE]\n\n"
            status = "answered"
        except Exception as raised:
            refusal = _refusal(raised, self.settings.timeout)
            if not isinstance(refusal, HTTPException):
                raise
            yield _event(refusal.detail)
        finally:
            self._end(answer.choices, status)

    def _end(self, choices: Sequence[Choice], status: str) -> None:
        self.metrics.requests.labels(status).inc()
        for choice in choices:
            choice.cancel()
            self.metrics.count(choice)


def create_app(engine: Engine, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> FastAPI:
    """The application, for any ASGI server. `engine`: is to run while requests come."""
    server = Server(engine, tokenizer, settings)
    app = FastAPI(title="cerberus", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, most=settings.max_body, timeout=settings.timeout)
    app.exception_handler(AnyHTTPException)(_error)  # starlette's own, too
    app.exception_handler(RequestValidationError)(_invalid)

    def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if settings.key and not hmac.compare_digest(given.encode("latin-1"), os.fsencode(settings.key)):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    own = [Depends(authorized)]
    created = int(time.time())
    model = {"id": settings.model, "object": "model", "created": created, "owned_by": "cerberus_ext"}

    @app.post("/v1/chat/completions", dependencies=own)
    async def chat(request: Request, asked: ChatRequest) -> Any:
        return await server.answer(CHAT, request, asked, [[message.plain() for message in asked.messages]])

    @app.post("/v1/completions", dependencies=own)
    async def complete(request: Request, asked: CompletionRequest) -> Any:
        return await server.answer(COMPLETION, request, asked, asked.prompts())

    @app.get("/v1/models", dependencies=own)
    async def models() -> Any:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}", dependencies=own)
    async def named(name: str) -> Any:
        if name != settings.model:
            raise Refusal(404, f"model: there is only {settings.model!r}", "model", "model_not_found")
        return model

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(server.metrics.text(), media_type="text/plain; version=1.0.0")

    return app


async def _rest(pieces: AsyncIterator[Piece], choices: Sequence[Choice]) -> None:
    """Until all choices have ended, the first of which has begun."""
    for choice in choices:
        async for _ in pieces if choice is choices[0] else choice.pieces():
            pass


async def _unless_gone(request: Request, work: Awaitable[R]) -> R:
    """What the work returns. Where the client goes away, it is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(499, "the client has gone")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(raised: BaseException, timeout: float) -> BaseException:
    """As a client is told of it."""
    if isinstance(raised, Busy):
        return Refusal(429, "as many requests wait as may wait: try again later", code="too_many_requests")
    if isinstance(raised, Refused):
        return Refusal(400, str(raised))
    if isinstance(raised, asyncio.TimeoutError):
        return Refusal(504, f"the answer took more than {timeout:g} s")
    if isinstance(raised, HTTPException) or not isinstance(raised, Exception):
        return raised
    return Refusal(500, f"{type(raised).__name__}: the answer failed")


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def _error(_: Request, raised: Any) -> JSONResponse:
    detail = raised.detail if isinstance(raised.detail, dict) else error(str(raised.detail), "invalid_request_error")
    headers = {"Retry-After": str(RETRY_AFTER)} if raised.status_code == 429 else raised.headers
    return JSONResponse(detail, raised.status_code, headers)


async def _invalid(_: Request, raised: Any) -> JSONResponse:
    """Names the field, and never repeats what was sent."""
    first = raised.errors()[0]
    names = [str(name) for name in first["loc"][1:] if first["type"] != "json_invalid"]  # of that a place in the text
    param, _, message = first["msg"].removeprefix("Value error, ").partition(": ")
    if message:  # a field that is not supported
        return JSONResponse(error(f"{param}: {message}", "invalid_request_error", param), 400)
    where = ".".join(names) or "body"
    return JSONResponse(error(f"{where}: {first['msg']}", "invalid_request_error", where), 400)
