"""Seconds of calls that are compared. A machine may slow down for a while, so what is compared takes turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


def rotated(items: Sequence[T], number: int) -> list[T]:
    """All of them in their order, beginning with item `number`, counted round and round."""
    first = number % len(items)
    return [*items[first:], *items[:first]]


def wait_for(device: torch.device | str) -> None:
    """Until everything given to the device is done; on the CPU it is when a call returns."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], T], device: torch.device | str) -> tuple[T, float]:
    """What a call returns, and its seconds by the host's clock; the device is idle before and after."""
    wait_for(device)
    begin = time.perf_counter()
    result = call()
    wait_for(device)
    return result, time.perf_counter() - begin
