"""One thread that decodes what requests ask for; each of them reads its own tokens as they come."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..io.model_files import first_line

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.decoder import Decoder
    from ..runtime.stats import DecodeStats


class Busy(Exception):
    """As many answers wait as may wait."""


class Refused(ValueError):
    """A request that `decode` refuses; says why."""


@dataclass(eq=False)
class Job:
    """One answer. end: when it has to be there, by the loop's clock. stats: once it has begun."""

    ids: Tensor
    options: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    end: float
    chunks: asyncio.Queue[list[int] | BaseException | None] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    stats: DecodeStats | None = None

    def cancel(self) -> None:
        """Nobody reads it any more: it ends within a step."""
        self.cancelled.set()

    async def tokens(self) -> AsyncGenerator[list[int], None]:
        """As steps add them. Raises Refused, asyncio.TimeoutError, or what went wrong."""
        while (chunk := await asyncio.wait_for(self.chunks.get(), self.end - self.loop.time())) is not None:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def put(self, chunk: list[int] | BaseException | None) -> None:
        """From the engine's thread."""
        with suppress(RuntimeError):  # the loop has ended, and whoever read with it
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)


class Engine:
    """Answers in the order of their requests, one after the other.

    waiting: how many requests may wait, at most. A context manager: what waits when it ends is refused.
    """

    def __init__(self, decoder: Decoder, waiting: int) -> None:
        self._decoder = decoder
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="cerberus engine", daemon=True)

    def submit(self, ids: Tensor, options: dict[str, Any], timeout: float) -> Job:
        """ids, options: as in `decode`; timeout: seconds, waiting included. From the event loop. Raises Busy."""
        loop = asyncio.get_running_loop()
        job = Job(ids, options, loop, loop.time() + timeout)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.cancelled.is_set():
                self._answer(job)

    def _answer(self, job: Job) -> None:
        """Whatever goes wrong ends this answer alone."""
        try:
            try:
                stream: Any = self._decoder.stream(job.ids, **job.options)
            except (ValueError, TypeError) as error:
                raise Refused(first_line(str(error))) from error
            job.stats = self._decoder.stats
            with closing(stream):
                for chunk in stream:
                    if job.cancelled.is_set():
                        return
                    job.put(chunk.tokens)
            job.put(None)
        except BaseException as error:
            job.put(error)
