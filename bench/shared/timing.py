"""Seconds of a call, on the CPU by the host's clock and on a GPU by its events: warmed up, repeated, the median.

On a GPU a call is timed in two ways. In a CUDA graph of many calls the launches cost the host nothing, as in a decoding
step that is one graph. Alone on an idle stream, the time from one event to the next also holds the launch.

What a decoding step reads has left the caches since the step before. So calls take turns on copies of their inputs, of
which there are enough to push the first one out of the L2 cache before it is used again (`copies_for`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, TypeVar

import torch

from cerberus_ext.evaluation.timing import timed, wait_for
from cerberus_ext.runtime.recorder import CudaRecorder

Call = Callable[[], Any]
T = TypeVar("T")

FEWEST_CALLS = 20  # in a graph, so that the launch of the graph itself does not count
MAX_COPIES = 512  # inputs so small that more would be needed are timed from the cache
_SECONDS = 0.06  # of replays for one number, besides the warm-up


def cache_bytes(device: str) -> int:
    """The GPU's L2; for a CPU a size that few last-level caches exceed."""
    return 2**25 if device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size


def copies_for(moved: int, device: str) -> tuple[int, bool]:
    """How many copies of inputs of `moved` bytes to take turns on, and whether each is then read from memory."""
    needed = 1 + 2 * cache_bytes(device) // max(1, moved)
    return (needed, True) if needed <= MAX_COPIES else (FEWEST_CALLS, False)


def tried(call: Callable[[], T], device: str) -> tuple[T | None, str | None]:
    """What a call returns, or the error it raises. An error that has broken the GPU's context is raised: nothing
    that this process does on the GPU after it would work."""
    try:
        return call(), None
    except (RuntimeError, ValueError) as error:
        wait_for(device)
        return None, str(error).strip().splitlines()[0][:300]


def seconds_of(call: Call, device: str, repeats: int, before: Call | None = None) -> list[float]:
    """Of each of `repeats` calls. `before` runs before each, untimed; the device is idle when a call begins."""
    found = []
    for _ in range(repeats):
        if before is not None:
            before()
        wait_for(device)
        if device == "cpu":
            found.append(timed(call, device)[1])
        else:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
    return found


def alone(calls: Sequence[Call], reset: Call | None, device: str, repeats: int = 30) -> float:
    """Seconds of a single call: the median over calls that take turns."""
    turn = iter(range(10**9))

    def call() -> None:
        calls[next(turn) % len(calls)]()

    seconds_of(call, device, 3, reset)
    return median(seconds_of(call, device, repeats, reset))


def in_graph(calls: Sequence[Call], reset: Call | None) -> float:
    """Seconds of a call within a CUDA graph that makes all of them, each at least once.

    Raises RuntimeError where a call cannot be captured.
    """
    made = [calls[i % len(calls)] for i in range(max(FEWEST_CALLS, len(calls)))]
    recorder, graph = CudaRecorder(torch.device("cuda")), torch.cuda.CUDAGraph()
    for call in made[:3]:  # what a first call sets up cannot be captured
        recorder.warm_up(call, last=False)
    recorder.warm_up(made[0], last=True)
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for call in made:
                call()
    finally:
        torch.cuda.set_stream(current)  # a capture that fails leaves torch on its own
    try:
        once = median(seconds_of(graph.replay, "cuda", 3, reset))
        repeats = min(200, max(7, int(_SECONDS / max(once, 1e-6))))
        return median(seconds_of(graph.replay, "cuda", repeats, reset)) / len(made)
    finally:
        graph.reset()
