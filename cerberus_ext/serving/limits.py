"""Bodies of requests are read up to a limit."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse

from .answers import error


class BodyLimit:
    """ASGI middleware: 413 for a body of more than `most` bytes, of which no more than these are kept."""

    def __init__(self, app: Any, most: int) -> None:
        self._app = app
        self._most = most
        self._detail = error(f"the body must have at most {most} bytes", "invalid_request_error")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        length, read = dict(scope["headers"]).get(b"content-length", b"0"), 0

        async def limited() -> Any:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, self._detail)  # what reads the body passes it on to its handler
            return message

        if length.isdigit() and int(length) > self._most:
            return await JSONResponse(self._detail, 413, {"Connection": "close"})(scope, receive, send)
        await self._app(scope, limited, send)
