"""A correct call of every op that the package calls inside, as keyword arguments: those that write what they are given,
and those around a step, which take lists of tensors or no tensor at all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from op_cases import SMALL_TREE, integers, normal, tree
from step_codes import OUT, VOCAB, WIDTH, experts_step, linear_step
from torch import Tensor

from cerberus_ext.ops.draft import in_eight_bits
from cerberus_ext.ops.native import native


def _settle(dtype: torch.dtype) -> dict[str, Any]:
    """Of two texts."""
    parents, ancestors, _ = tree(SMALL_TREE, "cpu")
    return {
        "draft": integers(0, 2, 10, seed=1),
        "target": integers(0, 2, 10, seed=2),
        "parents": parents.repeat(2),
        "ancestors": [ancestors, ancestors],
        "cache": [normal(4, 1, 2, 16, 3, seed=seed, dtype=dtype) for seed in range(2)],
        "length": [torch.tensor([7]), torch.tensor([3])],
        "hidden": normal(10, 6, dtype=dtype),
        "state": [normal(1, 6, seed=seed, dtype=dtype) for seed in range(2)],
        "pending": [torch.zeros(1, dtype=torch.int64) for _ in range(2)],
        "path": torch.zeros(10, dtype=torch.int64),
    }


def _draft(dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden": normal(2, 33, dtype=dtype),
        "pending": torch.tensor([3, 40]),
        "embeddings": normal(41, 33, seed=1, dtype=dtype),
        "anchor_scale": torch.tensor(0.5, dtype=dtype),
        "stack": in_eight_bits(normal(2, 3, 33, 66, seed=2, dtype=dtype)),
        "bias": normal(2, 3, 33, seed=3, dtype=dtype),
        "projection": in_eight_bits(normal(37, 33, seed=4, dtype=dtype)),
        "vocab": 37,
        "vocabulary": torch.arange(37),
        "ids": torch.zeros(2, 3, 4, dtype=torch.int64),
        "logprobs": torch.zeros(2, 3, 4),
    }


def _eight_bit_bytes(dtype: torch.dtype) -> dict[str, Any]:
    return {"rows": 17, "size": 33}


def _pack_eight_bits(dtype: torch.dtype) -> dict[str, Any]:
    packed = torch.zeros(native.eight_bit_bytes(17, 33) // 2, dtype=torch.int16)
    return {"weight": normal(17, 33, dtype=dtype), "packed": packed}


def _eight_bit_linear(dtype: torch.dtype) -> dict[str, Any]:
    weight = in_eight_bits(normal(17, 33, dtype=dtype))
    return {"input": normal(5, 33, dtype=dtype), "weight": weight, "output": torch.zeros(5, 17, dtype=dtype)}


def _packed_bytes(dtype: torch.dtype) -> dict[str, Any]:
    return {"weight": normal(7, 64, dtype=dtype), "rows": 12}


def _pack_weights(dtype: torch.dtype) -> dict[str, Any]:
    weights = [normal(rows, 64, seed=rows, dtype=dtype) for rows in (7, 5)]
    return {"weights": weights, "packed": torch.zeros(native.packed_bytes(weights[0], 12), dtype=torch.uint8)}


def _block_bytes(dtype: torch.dtype) -> dict[str, Any]:
    return {**_packed_bytes(dtype), "bits": 4}


def _pack_blocks(dtype: torch.dtype) -> dict[str, Any]:
    weights = [integers(0, 16, rows, 64, seed=rows).to(dtype) for rows in (7, 5)]
    return {"weights": weights, "packed": torch.zeros(native.block_bytes(weights[0], 12, 4), dtype=torch.int8)}


def _device_block_bytes(dtype: torch.dtype) -> dict[str, Any]:
    return {"weight": normal(7, 64, dtype=dtype), "bits": 4}


def _pack_device_blocks(dtype: torch.dtype) -> dict[str, Any]:
    weight = integers(0, 16, 7, 64).to(dtype)
    return {"weight": weight, "packed": torch.zeros(native.device_block_bytes(weight, 4), dtype=torch.int8)}


def _dequantize_blocks(dtype: torch.dtype) -> dict[str, Any]:
    return {"blocks": torch.zeros(3, 40, dtype=torch.uint8), "kind": 3, "weights": torch.zeros(3, 64)}


def _make_step(dtype: torch.dtype) -> dict[str, Any]:
    tensors, code = experts_step(dtype, False)
    return {"tensors": tensors, "code": torch.tensor(code)}


@cache
def _step(dtype: torch.dtype) -> int:
    """Of a step that stays."""
    tensors, code = linear_step(dtype, False)
    return int(native.make_step(tensors, torch.tensor(code)))


def _run_step(dtype: torch.dtype) -> dict[str, Any]:
    """Of two texts."""
    return {
        "step": _step(dtype),
        "tokens": torch.arange(6) % VOCAB,
        "positions": torch.arange(6),
        "length": [torch.tensor([2]), torch.tensor([0])],
        "ancestors": [torch.ones(4, 1, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64)],
        "cache": [torch.zeros(2, 1, 1, 8, 4, dtype=dtype) for _ in range(2)],
        "hidden": torch.zeros(6, WIDTH, dtype=dtype),
        "logits": torch.zeros(6, OUT, dtype=dtype),
    }


def _step_times(dtype: torch.dtype) -> dict[str, Any]:
    return {"step": _step(dtype), "on": False}


def _free_step(dtype: torch.dtype) -> dict[str, Any]:
    tensors, code = linear_step(dtype, False)
    return {"step": int(native.make_step(tensors, torch.tensor(code)))}


def _prefer_large_pages(dtype: torch.dtype) -> dict[str, Any]:
    return {"memory": torch.zeros(3, 1 << 18, dtype=dtype)}


def _release_mapped(dtype: torch.dtype) -> dict[str, Any]:
    return {"memory": torch.zeros(3, 1 << 12, dtype=dtype)}


def _trim_heap(dtype: torch.dtype) -> dict[str, Any]:
    return {}


NATIVE_EXAMPLES: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "settle": _settle,
    "draft": _draft,
    "eight_bit_bytes": _eight_bit_bytes,
    "pack_eight_bits": _pack_eight_bits,
    "eight_bit_linear": _eight_bit_linear,
    "packed_bytes": _packed_bytes,
    "pack_weights": _pack_weights,
    "block_bytes": _block_bytes,
    "pack_blocks": _pack_blocks,
    "device_block_bytes": _device_block_bytes,
    "pack_device_blocks": _pack_device_blocks,
    "dequantize_blocks": _dequantize_blocks,
    "make_step": _make_step,
    "run_step": _run_step,
    "step_times": _step_times,
    "free_step": _free_step,
    "prefer_large_pages": _prefer_large_pages,
    "release_mapped": _release_mapped,
    "trim_heap": _trim_heap,
}


def call(op: str, arguments: dict[str, Any]) -> None:
    """Makes it. A step that could be made is run, once, and freed."""
    result = getattr(native, op)(**arguments)
    if op == "make_step":
        tokens, hidden = torch.arange(3), torch.zeros(3, WIDTH, dtype=arguments["tensors"][0].dtype)
        places: list[Tensor] = [torch.tensor([1]), torch.ones(3, 1, dtype=torch.int64)]
        cache_of_step = torch.zeros(2, 1, 1, 8, 4, dtype=hidden.dtype)
        try:
            logits = torch.zeros(3, 2 * OUT + 2, dtype=hidden.dtype)
            native.run_step(result, tokens, tokens, [places[0]], [places[1]], [cache_of_step], hidden, logits)
        except RuntimeError as error:  # another hidden size, another dtype
            if not str(error).startswith("run_step: "):
                raise
        finally:
            native.free_step(result)
