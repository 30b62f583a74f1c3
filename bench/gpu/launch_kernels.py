"""Launches every kernel of every op at sizes small enough for compute-sanitizer, which slows them down a lot.

    python bench/gpu/launch_kernels.py [--device cpu] [--until SECONDS]
    python bench/gpu/launch_kernels.py --invalid    one call that reads outside of all memory, on a GPU

Every dtype and every size that chooses another kernel or another path through one. Ends with the line
"launched N calls, all of them".
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cerberus_ext import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests" / "helpers"))
from op_cases import CUDA_OPS, attention_inputs, example, integers, normal, random_parents, rerank_inputs, tree  # noqa: E402

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Call = Callable[[], Any]


def head_stacks(dtype: torch.dtype, device: str) -> Iterator[Call]:
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    for size, heads, layers, rows, width in (
        (64, 4, 2, 1, 2),
        (264, 3, 3, 3, 2),
        (128, 2, 1, 16, 2),
        (128, 4, 2, 64, 1),
        (33, 2, 2, 2, 2),
    ):
        hidden, anchor = normal(rows, size, **given), normal(rows, size, seed=1, **given)
        weight = normal(layers, heads, size, width * size, seed=2, scale=0.05, **given)
        bias = normal(layers, heads, size, seed=3, **given)
        yield partial(ops.head_stack, hidden, anchor, weight, bias)


def draft_topks(dtype: torch.dtype, device: str) -> Iterator[Call]:
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    for rows, heads, size, vocab, drafts in (
        (1, 4, 64, 4099, 8),
        (1, 4, 64, 130, 32),
        (3, 3, 40, 1000, 1),
        (16, 4, 64, 515, 8),
        (64, 4, 32, 300, 3),
        (2, 2, 33, 77, 5),
    ):
        states = normal(rows, heads, size, **given)
        projection = normal(vocab, size, seed=1, **given)
        yield partial(ops.draft_topk, states, projection, drafts)


def attentions(dtype: torch.dtype, device: str) -> Iterator[Call]:
    for head_size in (16, 64, 80, 96, 128, 256):
        yield from attention_calls(dtype, device, 5, [0, 70], head_size=head_size)
    for nodes, lengths in ((1, [300]), (17, [1]), (64, [600]), (70, [3]), (130, [129]), (256, [40])):
        yield from attention_calls(dtype, device, nodes, lengths, head_size=64, query_heads=9, kv_heads=3)
    yield from attention_calls(dtype, device, 8, [2050], head_size=64, query_heads=8, kv_heads=1)
    yield from attention_calls(dtype, device, 33, [200], window=64, head_size=64)


def attention_calls(
    dtype: torch.dtype, device: str, nodes: int, lengths: list[int], window: int = 0, **sizes: int
) -> Iterator[Call]:
    a = attention_inputs(len(lengths), random_parents(nodes), lengths, dtype=dtype, device=device, **sizes)
    yield partial(ops.tree_attention, **a | {"window": window})


def choices(dtype: torch.dtype, device: str) -> Iterator[Call]:
    for rows, vocab in ((1, 1), (3, 129), (64, 5000), (1, 20011)):
        logits, positions = normal(rows, vocab, dtype=dtype, device=device), torch.arange(rows, device=device)
        for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.8, 50, 1.0), (0.8, 0, 0.9), (0.8, 50, 0.9)):
            yield partial(ops.choose_tokens, logits, positions, 7, temperature, top_k, top_p)


def others(dtype: torch.dtype, device: str) -> Iterator[Call]:
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    for size in (1, 33, 576, 4096):
        yield partial(ops.hidden_entropy, normal(3, size, **given))
    for rows, heads, drafts, rank in ((1, 4, 32, 64), (3, 2, 7, 33), (8, 5, 32, 40)):
        yield partial(ops.rerank, **rerank_inputs(rows, heads, drafts, rank, **given))
    for nodes in (1, 64, 130):
        parents, ancestors, depth = tree(random_parents(nodes), device)
        draft, target = (integers(0, 2, 2, nodes, seed=seed, device=device) for seed in (1, 2))
        yield partial(ops.verify_tree, draft, target, parents, ancestors, depth)
    for nodes, size in ((1, 8), (70, 64), (5, 33)):
        keys, values = (normal(2, 3, 100, size, seed=seed, **given) for seed in (1, 2))
        new = normal(2, nodes, 3, size, seed=3, **given)
        length = torch.tensor([0, 40], device=device)  # 40 + 70 nodes are more than fit
        yield partial(ops.write_cache, keys, values, new, new, length)


def calls(device: str) -> Iterator[Call]:
    """Those that differ most come first."""
    for dtype in DTYPES:
        for op in CUDA_OPS:
            yield partial(getattr(ops, op), **example(op, dtype, device))
    for make in (head_stacks, draft_topks, attentions, choices, others):
        for dtype in DTYPES:
            yield from make(dtype, device)


def invalid_read(device: str) -> None:
    """Values are not checked: a parent that does not exist is looked up far behind the end of its tensor."""
    if device == "cpu":
        raise SystemExit("launch_kernels: --invalid is for a GPU, it would end this process")
    parents, ancestors, depth = tree([-1, 0], device)
    parents[1] = 2**50
    draft = integers(0, 2, 1, 2, device=device)
    ops.verify_tree(draft, draft, parents, ancestors, depth)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--until", type=float, default=float("inf"), help="time in seconds since 1970 to stop at")
    parser.add_argument("--invalid", action="store_true", help="only one call, which reads outside of all memory")
    arguments = parser.parse_args()
    if arguments.invalid:
        invalid_read(arguments.device)
        return
    launched, whole = 0, True
    for call in calls(arguments.device):
        if time.time() > arguments.until:
            whole = False
            break
        call()
        launched += 1
    if arguments.device != "cpu":
        torch.cuda.synchronize()
    print(f"launched {launched} calls{', all of them' if whole else ''}")


if __name__ == "__main__":
    main()
