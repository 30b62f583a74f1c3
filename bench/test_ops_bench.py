"""Every op next to plain PyTorch for the same result, at the sizes of SmolLM2-135M.

pytest bench --benchmark-only

Ours and PyTorch's take turns, each with a cold cache, as in a decoding step, where the rest of the model has been in
between; both are warmed up and the medians compared. The table at the end is conftest.py's.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from machine import copy_bandwidth, wait_for
from op_calls import CALLS

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROUNDS = 15
CASES = [
    (op, device, dtype)
    for op in CALLS
    for device in DEVICES
    for dtype in (torch.float32, torch.bfloat16)
    # linear is for CPUs, and verify_tree reads whole numbers only
    if not (op.startswith("linear") and device == "cuda") and not (op == "verify_tree" and dtype != torch.float32)
]
CACHE_BYTES = 2**26  # more than the caches of most machines


@pytest.mark.parametrize(("op", "device", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_op(op, device, dtype, benchmark):
    calls = CALLS[op](dtype, device)
    filler = torch.zeros(CACHE_BYTES // 4, device=device)
    eager_seconds = []

    def take_turns() -> None:
        """Before each of our rounds: PyTorch's."""
        filler.add_(1)
        wait_for(device)
        start = time.perf_counter()
        calls.eager()
        wait_for(device)
        eager_seconds.append(time.perf_counter() - start)
        filler.add_(1)
        wait_for(device)

    def ours() -> None:
        calls.ours()
        wait_for(device)

    benchmark.group = op
    benchmark.pedantic(ours, setup=take_turns, rounds=ROUNDS, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    eager = statistics.median(eager_seconds[2:])
    benchmark.extra_info.update(
        op=op,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        milliseconds=seconds * 1e3,
        eager_milliseconds=eager * 1e3,
        speedup=eager / seconds,
        gigabytes_per_second=calls.bytes / seconds / 1e9,
        share_of_copy_bandwidth=calls.bytes / seconds / copy_bandwidth(device),
    )
