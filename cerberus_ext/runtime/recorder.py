"""What records a step on a device and repeats it: on a GPU, CUDA graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor


class Unrecordable(Exception):
    """A step cannot be recorded; the message says why."""


class Recorder(Protocol):
    """Records what the device is told to do. All recordings of one recorder may share their temporary memory."""

    def warm_up(self, run: Callable[[], None], last: bool) -> None:
        """Runs it, where it is going to be recorded. last: the next time it is; it may raise what that would."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """-> what does the same again, on the current stream, with the same memory."""

    def fetch(self, source: Tensor, host: Tensor) -> None:
        """Copies a tensor to the host and waits until it is there, for nothing else."""


class CudaRecorder:
    """Records CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()

    def warm_up(self, run: Callable[[], None], last: bool) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), waiting_refused(last):
            run()
        current.wait_stream(self._stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            try:
                # thread_local: what other threads do meanwhile, a streamer's for instance, is no error.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    run()
            finally:
                # A recording that fails at its end leaves torch on the side stream.
                torch.cuda.set_stream(current)
        return graph.replay

    def fetch(self, source: Tensor, host: Tensor) -> None:
        host.copy_(source, non_blocking=True)  # pinned
        self._copied.record(torch.cuda.current_stream(self._device))
        self._copied.synchronize()


@contextmanager
def waiting_refused(refused: bool) -> Iterator[None]:
    """While inside, what waits for the device raises, as it would while recording: a recording that fails keeps its
    memory for good. The mode is the whole process's, so that it is left alone where there are other threads."""
    before = torch.cuda.get_sync_debug_mode()
    if refused and threading.active_count() == 1:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by the type of the device


def expected_on(device: torch.device) -> bool:
    """Whether a user wants to know that there are no graphs."""
    return device.type == "cuda"
