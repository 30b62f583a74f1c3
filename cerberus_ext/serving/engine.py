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

    from ..engine.batch import Batch
    from ..engine.decoder import Decoder
    from ..engine.request import Request
    from ..runtime.stats import DecodeStats
    from ..runtime.stepper import Chunk
    from .logprobs import Logprobs


class Busy(Exception):
    """As many answers wait as may wait."""


class Refused(ValueError):
    """A request that `decode` refuses; says why."""


@dataclass(eq=False)
class Job:
    """One answer. end: when it has to be there, by the loop's clock. request: once it is decoded. logprobs: to be
    filled, or None."""

    ids: Tensor
    options: dict[str, Any]
    loop: asyncio.AbstractEventLoop
    end: float
    chunks: asyncio.Queue[list[int] | BaseException | None] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    request: Request | None = None
    logprobs: Logprobs | None = None

    @property
    def stats(self) -> DecodeStats | None:
        return None if self.request is None else self.request.stats

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
    """Decodes the answers, at most `slots` at once; others wait in the order of their requests.

    waiting: how many may wait. A context manager: when it ends, what was asked is answered first.
    """

    def __init__(self, decoder: Decoder, waiting: int, slots: int) -> None:
        self._decoder, self._slots = decoder, slots
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self._running: dict[int, Job] = {}
        self._thread = threading.Thread(target=self._run, name="cerberus engine", daemon=True)

    def submit(self, ids: Tensor, options: dict[str, Any], timeout: float, logprobs: Logprobs | None = None) -> Job:
        """ids, options: as in `decode`; timeout: seconds, waiting included. From the event loop. Raises Busy."""
        loop = asyncio.get_running_loop()
        if logprobs is not None:
            options = {**options, "logits_processor": [logprobs]}
        job = Job(ids, options, loop, loop.time() + timeout, logprobs=logprobs)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy from None
        return job

    @property
    def waiting(self) -> int:
        return self._jobs.qsize()

    @property
    def most_waiting(self) -> int:
        return self._jobs.maxsize

    @property
    def running(self) -> int:
        return len(self._running)

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            batch = self._decoder.batch(self._slots)
            ended = self._take(batch, wait=True)
            try:
                with closing(batch.chunks()) as chunks:
                    for chunk in chunks:
                        self._put(batch, chunk)
                        ended = ended or self._take(batch)
            except Exception as error:  # ends what is decoded at this moment, and nothing else
                for job in self._running.values():
                    job.put(error)
                self._running.clear()

    def _take(self, batch: Batch, wait: bool = False) -> bool:
        """Adds what waits to the batch where there is room. wait: for the first. True: there will be nothing more."""
        while len(self._running) < self._slots:
            try:
                job = self._jobs.get(wait and not self._running)
            except queue.Empty:
                return False
            if job is None:
                return True
            if job.cancelled.is_set():
                continue
            try:
                job.request = batch.add(job.ids.tolist(), **job.options)  # as a list: wherever the model is
                self._running[job.request.row] = job
            except (ValueError, TypeError) as error:
                job.put(Refused(first_line(str(error))))
            except Exception as error:
                job.put(error)
        return False

    def _put(self, batch: Batch, chunk: Chunk) -> None:
        job = self._running.get(chunk.row)
        if job is None or job.request is None:  # a step was on its way when it was let go
            return
        if job.cancelled.is_set():
            batch.end(job.request)
        if job.logprobs is not None:
            job.logprobs.take(chunk.tokens)
        job.put(chunk.tokens)
        if job.request.text.ended:
            del self._running[chunk.row]
            job.put(job.request.error)  # None: it is whole
