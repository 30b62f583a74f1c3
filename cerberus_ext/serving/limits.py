"""Bodies of requests are read up to a limit, and not for longer than one."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

from .answers import error

CLOSE = {"Connection": "close"}  # what is left of the body is not to be read as the next request


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `most` bytes, of which no more than these are kept; 408 for one that
    takes more than `timeout` seconds to come."""

    def __init__(self, app: Any, most: int, timeout: float) -> None:
        self._app = app
        self._most, self._timeout = most, timeout
        self._detail = error(f"the body must have at most {most} bytes", "invalid_request_error")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length, read = dict(scope["headers"]).get(b"content-length", b"0"), 0
        clock = asyncio.get_running_loop().time
        end: float | None = clock() + self._timeout  # None: the body is there

        async def limited() -> Any:
            nonlocal read, end
            try:
                message = await asyncio.wait_for(receive(), end and end - clock())
            except asyncio.TimeoutError:
                detail = error(f"the body took more than {self._timeout:g} s", "timeout_error")
                raise HTTPException(408, detail, CLOSE) from None
            if not message.get("more_body"):
                end = None
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, self._detail, CLOSE)  # what reads the body passes it on to its handler
            return message

        if length.isdigit() and int(length) > self._most:
            return await JSONResponse(self._detail, 413, CLOSE)(scope, receive, send)
        await self._app(scope, limited, send)
