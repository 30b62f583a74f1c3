"""Texts that come while others are decoded: what a server does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping
from typing import Any

from transformers import PreTrainedModel

from ..runtime.runtime import runtime_of
from ..runtime.session import Running, session
from ..runtime.stepper import Chunk
from .loop import generate
from .request import Request, Requests


class Batch:
    """Made by `Decoder.batch`. `chunks` decodes what was added, and what is added meanwhile."""

    def __init__(
        self,
        request: Callable[[Any, Mapping[str, Any]], Requests],
        model: PreTrainedModel,
        running: tuple[bool | None, bool | None, bool | None],
        slots: int,
    ) -> None:
        self._request, self._model = request, model
        self._running = Running(*running, slots)
        self._waiting: deque[Request] = deque()
        self._latest: Requests | None = None
        self._count = 0

    def add(self, ids: Any, **options: Any) -> Request:
        """One more text; ids (1, S) or (S,), options: as in `decode`. Its chunks have the row of what this returns.

        Raises as `decode`.
        """
        self._latest = self._request(ids, options)
        if len(self._latest.texts) != 1:
            raise ValueError(f"decode: ids must be one prompt here, got {len(self._latest.texts)}")
        request = self._latest.texts[0]
        request.row, self._count = self._count, self._count + 1
        self._waiting.append(request)
        return request

    def end(self, request: Request) -> None:
        """It takes no more tokens, and is let go before the next step."""
        request.text.stopped = True
        if request in self._waiting:
            self._waiting.remove(request)

    def chunks(self) -> Generator[Chunk, None, None]:
        """Until nothing is left: the tokens that steps add. The model is decoding meanwhile.

        A text that fails before its first token ends alone: with an empty chunk, and the error in its Request.
        """
        if self._latest is None:
            return
        plan = self._latest.plan
        with session(runtime_of(self._model), plan.drafts, self._running) as texts:
            yield from generate(texts, plan, self._waiting, self._running.slots, True, apart=True)
