"""Runs libraries of emulated kernels, each in a process of its own, and says whether their ops are right.

    python simt_broken.py OP LIBRARY [OP LIBRARY ...]

prints a line for each: "right", or "wrong: " and how that was found. A broken kernel may write anywhere, so that none
runs in the process of the tests; they are forked from this one, which has torch loaded.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from attention_paths import alone, cancelling_inputs
from block_weights import cancelling, q4_1, q8_0
from device_steps import EmulatedStep, product, run
from op_cases import (
    DTYPES,
    TOLERANCE,
    assert_close,
    assert_same_bits,
    attention_inputs,
    chain,
    example,
    integers,
    normal,
    random_parents,
    rerank_inputs,
    tree,
)
from simt_library import Emulation
from step_codes import OUT, linear_step

from cerberus_ext.ops import reference
from cerberus_ext.ops.step import NativeStep
from cerberus_ext.runtime.fused.device_weights import in_blocks

SEEDS = 6
SECONDS = 60  # of one library


def cases(op: str) -> Iterator[list[Any]]:
    """Arguments: more than one block, more than one warp, and borders that no tile divides."""
    for dtype in DTYPES:
        yield list(example(op, dtype).values())
        if op == "hidden_entropy":
            yield [normal(2, 520, scale=3.0, dtype=dtype)]
        elif op == "head_stack":
            for rows in (1, 9):
                yield [
                    normal(rows, 40, seed=1, dtype=dtype),
                    normal(rows, 40, seed=2, dtype=dtype),
                    normal(3, 3, 40, 80, seed=3, scale=0.1, dtype=dtype),
                    normal(3, 3, 40, seed=4, dtype=dtype),
                ]
        elif op == "draft_topk":
            for heads in (1, 5):
                states, projection = integers(-2, 3, 1, heads, 40, seed=1), integers(-2, 3, 203, 40, seed=2)
                yield [states.to(dtype), projection.to(dtype), 6]
            yield [torch.zeros(1, 1, 40, dtype=dtype), projection.to(dtype), 6]  # every token counts alike
        elif op == "rerank":
            for rank in (33, 64):
                yield list(rerank_inputs(2, 3, 32, rank, dtype=dtype).values())
        elif op == "choose_tokens":
            yield [integers(-3, 3, 2, 600).to(dtype), torch.arange(2), 7, 1.5, 60, 0.7]
        elif op == "tree_attention":
            for head_size in (33, 64):
                arguments = attention_inputs(2, random_parents(20), [70, 3], head_size=head_size, dtype=dtype)
                yield list(arguments.values())
                yield list((arguments | {"window": 5}).values())
            yield list(attention_inputs(1, chain(2), [300], dtype=dtype).values())  # in several pieces
        elif op == "verify_tree":
            parents, ancestors, depth = tree(random_parents(100, seed=1))
            draft, target = (integers(0, 2, 3, 100, seed=seed) for seed in (1, 2))
            yield [draft, target, parents, ancestors, depth]
            parents, ancestors, depth = tree(chain(50))
            draft = torch.zeros(1, 50, dtype=torch.int64)
            draft[0, 49] = 1  # all but the last node are right
            yield [draft, torch.zeros_like(draft), parents, ancestors, depth]


def copies(arguments: list[Any]) -> list[Any]:
    return [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]


def results(returned: Any, arguments: list[Any]) -> list[torch.Tensor]:
    """What the op returns, or has written to."""
    if returned is None:
        return [value for value in arguments if isinstance(value, torch.Tensor)]
    return list(returned) if isinstance(returned, tuple) else [returned]


def dtype_of(arguments: list[Any]) -> torch.dtype:
    """Of the first that is floating point."""
    tensors = (value for value in arguments if isinstance(value, torch.Tensor))
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.float32)


def check_products(simt: Emulation) -> None:
    """A step that embeds its tokens and multiplies what comes out; with weights in blocks it has the bits of the dense
    ones, of all parts in one launch."""
    tokens = torch.arange(20) % 7
    sizes = [20, 33, 400]
    states, dense = cancelling(q4_1(20, 640), q8_0(33, 640), normal(400, 640, dtype=torch.bfloat16))
    blocks = [weight if (found := in_blocks(weight)) is None else found for weight in dense]
    for seed in range(SEEDS):
        simt.seed(seed)
        simt.device(ptx_version=90 if seed % 2 else 80)
        for dtype in DTYPES:
            tensors, numbers = linear_step(dtype, packed=False, width=320)
            want, got = (
                run(step(tensors, torch.tensor(numbers)), tokens, dtype, (320, OUT))[1]
                for step in (NativeStep, EmulatedStep)
            )
            torch.testing.assert_close(got, want, atol=0.5 if dtype == torch.bfloat16 else 0.05, rtol=0.02)
        want, got = (product(weights, sizes, states, tokens) for weights in (dense, blocks))
        assert_same_bits(got, want)


def check_paths(simt: Emulation) -> None:
    """Nodes of trees against their paths decoded alone: one over the end of a tile in the second piece, and one of so
    many rows and nodes that keys and values take turns in shared memory."""
    bush = [-1, 0, 0, 1, 1, 4, 3, 3, 6, 6, 8, 5]
    for parents, length, head_size in ((bush, 284, 16), (random_parents(64, seed=4), 60, 128)):
        sizes = {"query_heads": 3, "kv_heads": 1, "head_size": head_size, "dtype": torch.bfloat16}
        arguments = cancelling_inputs(parents, length, **sizes)
        got = simt("tree_attention", *arguments.values())
        for node in (5, 10, len(parents) - 1):
            wanted = simt("tree_attention", *alone(arguments, parents, node, spare=300).values())
            assert_same_bits(got[:, node : node + 1], wanted)


def check(op: str, library: str) -> None:
    torch.set_num_threads(1)
    simt = Emulation(Path(library))
    if op == "step_product":
        return check_products(simt)
    wanted = []
    for arguments in cases(op):
        given = copies(arguments)
        wanted.append((arguments, results(getattr(reference, op)(*given), given)))
    for seed in range(SEEDS):
        simt.seed(seed)
        simt.device(ptx_version=90 if seed % 2 else 80)
        for arguments, expected in wanted:
            mine, dtype = copies(arguments), dtype_of(arguments)
            for got, right in zip(results(simt(op, *mine), mine), expected, strict=True):
                if op in TOLERANCE and right.is_floating_point():
                    assert_close(op, got, right, dtype, cuda=True)
                else:
                    assert torch.equal(got, right), "another result"
        if op == "tree_attention":
            check_paths(simt)


def main(op: str, library: str) -> str:
    """In a child process: its last words."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of its own time, however busy the machine is
        signal.alarm(10 * SECONDS)
        text = "right"
        try:
            check(op, library)
        except (RuntimeError, AssertionError) as error:
            text = f"wrong: {error}"
        except BaseException as error:
            text = f"no verdict: {error!r}"
        os.write(write, " ".join(text.split())[:400].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return text or f"wrong: ended by {signal.Signals(os.WTERMSIG(status)).name}"


if __name__ == "__main__":
    for op, library in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(main(op, library), flush=True)
