"""Every op next to plain PyTorch for the same result, at the sizes of three models.

    pytest bench --benchmark-only

Ours and PyTorch's take turns, each with a cold cache, as in a decoding step, where the rest of the model has been in
between; both are warmed up and the medians compared. The table at the end is conftest.py's. On a GPU these times hold
the launch: `bench/gpu` measures the kernels alone.
"""

from __future__ import annotations

import re
import statistics
from functools import partial
from pathlib import Path

import op_calls
import pytest
import torch
from machine import copy_bandwidth
from op_calls import weight_bytes
from shapes import SHAPES
from timing import cache_bytes, seconds_of, wait_for

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
MODELS = ("135M", "1B", "8B")
# name -> the function of op_calls, and what it is called with
CALLS = {
    "hidden_entropy": op_calls.hidden_entropy,
    "head_stack": op_calls.head_stack,
    "draft_topk": op_calls.draft_topk,
    "draft_topk, 32 drafts": partial(op_calls.draft_topk, drafts=32),
    "rerank": op_calls.rerank,
    "rerank, 8 rows": partial(op_calls.rerank, rows=8),
    "choose_tokens greedy, 8": partial(op_calls.choose_tokens, nodes=8),
    "choose_tokens greedy": op_calls.choose_tokens,
    "choose_tokens sampled": partial(op_calls.choose_tokens, temperature=0.8, top_k=50, top_p=0.95),
    "tree_attention": op_calls.tree_attention,
    "tree_attention, 1 at 256": partial(op_calls.tree_attention, nodes=1, length=256),
    "tree_attention, 8 at 256": partial(op_calls.tree_attention, nodes=8, length=256),
    "tree_attention, 8 at 1024": partial(op_calls.tree_attention, nodes=8, length=1024),
    "write_cache": op_calls.write_cache,
    "verify_tree": op_calls.verify_tree,
    "commit_cache": op_calls.commit_cache,
    "linear, 1 row": op_calls.linear,
    "linear, 32 rows": partial(op_calls.linear, rows=32),
    "linear, 32 rows to V": partial(op_calls.linear, rows=32, outputs=SHAPES["135M"].vocab),
    "activation silu, 8 rows": partial(op_calls.activation, rows=8),
    "activation silu": partial(op_calls.activation, rows=32),
    "activation gelu": partial(op_calls.activation, rows=32, kind="gelu"),
}
CASES = [
    (op, model, device, dtype)
    for op in CALLS
    for model in MODELS
    for device in DEVICES
    for dtype in (torch.float32, torch.bfloat16)
    if not (op.startswith(("linear", "activation")) and device == "cuda")  # they are for CPUs
    if not (op == "verify_tree" and (model, dtype) != ("135M", torch.float32))  # neither plays a part in it
    if not (op.endswith("to V") and model != "135M")
    if not (op.startswith("rerank") and model != "135M")  # nothing of it grows with the model
]
SECONDS = 1.5  # for the rounds of one case
FEWEST, MOST = 3, 15


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None  # Linux has it since 3.14
    return int(found[1]) * 1024


@pytest.mark.parametrize(("op", "model", "device", "dtype"), CASES, ids=lambda value: str(value).removeprefix("torch."))
def test_op(op, model, device, dtype, benchmark):
    needed = 3 * weight_bytes(op.split(" ")[0].rstrip(","), SHAPES[model], dtype)  # PyTorch may make copies
    if needed > free_bytes(device):
        pytest.skip(f"needs about {needed / 1e9:.1f} GB, {free_bytes(device) / 1e9:.1f} GB are free")
    calls = CALLS[op](SHAPES[model], dtype, device)
    filler = torch.zeros(2 * cache_bytes(device) // 4, device=device)
    reset = calls.reset or (lambda: None)

    def chill() -> None:
        reset()
        filler.add_(1)

    def ours() -> None:
        calls.ours()
        wait_for(device)

    eager_seconds: list[float] = []

    def take_turns() -> None:
        """Before each of our rounds: PyTorch's."""
        eager_seconds.extend(seconds_of(calls.eager, device, 1, chill))
        chill()
        wait_for(device)

    once = sum(seconds_of(call, device, 2, reset)[1] for call in (calls.ours, calls.eager))  # warm up, and how long
    rounds = min(MOST, max(FEWEST, int(SECONDS / once)))
    benchmark.group = f"{op}, {model}"
    benchmark.pedantic(ours, setup=take_turns, rounds=rounds)
    seconds = benchmark.stats.stats.median
    eager = statistics.median(eager_seconds)
    benchmark.extra_info.update(
        op=op,
        model=model,
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        milliseconds=seconds * 1e3,
        eager_milliseconds=eager * 1e3,
        speedup=eager / seconds,
        gigabytes_per_second=calls.bytes / seconds / 1e9,
        share_of_copy_bandwidth=calls.bytes / seconds / copy_bandwidth(device),
    )
