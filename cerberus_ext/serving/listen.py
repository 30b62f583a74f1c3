"""An application at an address of this machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI


class _Server(uvicorn.Server):
    """say: called with each address, once it listens there."""

    say: Callable[[str, int], object]

    async def startup(self, *arguments: Any, **keywords: Any) -> None:
        await super().startup(*arguments, **keywords)
        for listening in self.servers:
            for socket in listening.sockets:
                self.say(*socket.getsockname()[:2])


def listen(application: FastAPI, host: str, port: int, timeout: float, say: Callable[[str, int], object]) -> bool:
    """Until a signal ends it, with running answers answered first; False: it could not begin, and uvicorn has said why.

    timeout: seconds that these have, and clients that stop in mid-request or do not read. say: called with each
    address, once it listens there.
    """
    config = uvicorn.Config(
        application, host, port, log_level="warning", access_log=False, timeout_graceful_shutdown=math.ceil(timeout),
        http="h11",  # bounds what a client may send as headers; httptools, where it is installed, does not
    )  # fmt: skip
    server = _Server(config)
    server.say = say
    server.run()
    return bool(server.started)
