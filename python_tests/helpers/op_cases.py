"""What the tests of the ops share: sizes, dtypes, the one tolerance table, inputs, trees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cerberus_ext.ops.verify import sampling_numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 33, 129)

# (rtol, atol) between an op and its float64 reference. A float32 sum of a few hundred terms of size 1 is off by some
# 1e-6. A result that is rounded to 8 or 11 bits may fall to the other neighbour: one unit in the last place, which is
# at most 2^-7 or 2^-10 of the value. `head_stack` rounds after every layer, and a layer passes on what the one below
# did differently.
_FLOAT32 = (2e-5, 2e-5)
TOLERANCE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "hidden_entropy": dict.fromkeys(DTYPES, _FLOAT32),  # float32 whatever the input is
    "draft_topk": dict.fromkeys(DTYPES, _FLOAT32),
    "rerank": dict.fromkeys(DTYPES, _FLOAT32),
    "activation": {torch.float32: (2.5e-7, 1e-44), torch.bfloat16: (2**-7, 1e-40), torch.float16: (2**-10, 1e-7)},
    "linear": {torch.float32: _FLOAT32, torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)},
    "grouped_linear": {torch.float32: _FLOAT32, torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)},
    "tree_attention": {torch.float32: _FLOAT32, torch.bfloat16: (2**-7, 1e-5), torch.float16: (2**-10, 1e-5)},
    "head_stack": {torch.float32: _FLOAT32, torch.bfloat16: (2**-6, 2**-7), torch.float16: (2**-9, 2**-10)},
}


# Where CUDA differs. Tensor cores take the weights of the values rounded to the dtype, each off by up to 2^-9 or 2^-12
# of itself. For a mean of values of size up to 4 that is at most 2^-7 or 2^-10, however small the mean is.
CUDA_TOLERANCE: dict[str, dict[torch.dtype, tuple[float, float]]] = {
    "tree_attention": {torch.float32: _FLOAT32, torch.bfloat16: (2**-7, 2**-7), torch.float16: (2**-10, 2**-10)},
}


def assert_close(op: str, got: Tensor, expected: Tensor, dtype: torch.dtype, cuda: bool = False) -> None:
    """got is the op's result for inputs of this dtype, expected the reference's. cuda: on a GPU, or under emulation."""
    rtol, atol = (CUDA_TOLERANCE if cuda and op in CUDA_TOLERANCE else TOLERANCE)[op][dtype]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Bit for bit: tells -0 from 0 and lets a NaN equal itself."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    differs = got.contiguous().view(integers) != expected.contiguous().view(integers)
    assert not differs.any(), f"{int(differs.sum())} of {differs.numel()} values differ in their bits"


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Normally distributed, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device, dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """int64, low <= value < high."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(device)


# ---------------------------------------------------------------- trees


def tree(parents: list[int], device: str = "cpu") -> tuple[Tensor, Tensor, int]:
    """parents -> parents (N,), ancestors (N, W), depth: what the ops take. Shares no code with StaticPolicy."""
    words = -(-len(parents) // 64)
    masks = [0] * len(parents)
    for i, parent in enumerate(parents):
        masks[i] = (masks[parent] if parent >= 0 else 0) | 1 << i
    rows = []
    for mask in masks:
        unsigned = [mask >> (64 * word) & (2**64 - 1) for word in range(words)]
        rows.append([word - 2**64 if word >= 2**63 else word for word in unsigned])
    ancestors = torch.tensor(rows, dtype=torch.int64).reshape(len(parents), words)
    depth = max((bin(mask).count("1") for mask in masks), default=1) - 1
    return torch.tensor(parents, dtype=torch.int64, device=device), ancestors.to(device), depth


def chain(nodes: int) -> list[int]:
    """0 -> 1 -> 2 -> ..."""
    return list(range(-1, nodes - 1))


def random_parents(nodes: int, seed: int = 0) -> list[int]:
    """Any tree: every node hangs from one before it."""
    generator = torch.Generator().manual_seed(seed)
    return [-1] + [int(torch.randint(0, i, (1,), generator=generator)) for i in range(1, nodes)] if nodes else []


# ---------------------------------------------------------------- one correct call per op


def attention_inputs(
    rows: int,
    parents: list[int],
    lengths: list[int],
    *,
    query_heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 16,
    spare: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of tree_attention; the slots that nobody may look at hold NaN."""
    nodes = len(parents)
    capacity = max(lengths, default=0) + nodes + spare
    keys = normal(rows, kv_heads, capacity, head_size, seed=seed + 1)
    values = normal(rows, kv_heads, capacity, head_size, seed=seed + 2)
    for row, length in enumerate(lengths):
        keys[row, :, length + nodes :] = torch.nan
        values[row, :, length + nodes :] = torch.nan
    return {
        "q": normal(rows, nodes, query_heads, head_size, seed=seed, dtype=dtype, device=device),
        "keys": keys.to(device, dtype),
        "values": values.to(device, dtype),
        "length": torch.tensor(lengths, dtype=torch.int64, device=device),
        "ancestors": tree(parents, device)[1],
        "scale": head_size**-0.5,
        "window": 0,
        "softcap": 0.0,
        "sinks": None,
    }


def rerank_inputs(
    rows: int, heads: int, drafts: int, rank: int, *, vocab: int = 50, dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of rerank: of each head's drafts no two are alike, and at least a twentieth is left to the rest."""
    orders = normal(rows, heads, vocab, seed=1).argsort(-1)[..., :drafts]
    table = {"dtype": dtype, "device": device, "scale": rank**-0.25}
    return {
        "ids": orders.contiguous().to(device),
        "logprobs": (normal(rows, heads, drafts + 1, seed=2).log_softmax(-1)[..., 1:] - 0.06).contiguous().to(device),
        "parents": normal(heads - 1, vocab, rank, seed=3, **table),
        "children": normal(vocab, rank, seed=4, **table),
        "slopes": normal(heads - 1, seed=5).exp().to(device),
        "rest": normal(heads - 1, seed=6).to(device),
    }


# 0 -> 1 -> 3 -> 4
#   -> 2
SMALL_TREE = [-1, 0, 0, 1, 3]


def _hidden_entropy(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {"hidden": normal(3, 33, dtype=dtype, device=device)}


def _head_stack(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "hidden": normal(3, 33, seed=1, dtype=dtype, device=device),
        "anchor": normal(3, 33, seed=2, dtype=dtype, device=device),
        "weight": normal(2, 4, 33, 66, seed=3, scale=0.1, dtype=dtype, device=device),
        "bias": normal(2, 4, 33, seed=4, dtype=dtype, device=device),
    }


def _draft_topk(dtype: torch.dtype, device: str) -> dict[str, Any]:
    # Small whole numbers: every logit is exact, and there are ties.
    return {
        "states": integers(-2, 3, 2, 3, 33, seed=1, device=device).to(dtype),
        "projection": integers(-2, 3, 129, 33, seed=2, device=device).to(dtype),
        "drafts": 5,
    }


def _rerank(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return rerank_inputs(2, 3, 5, 33, dtype=dtype, device=device)


def _choose_tokens(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "logits": normal(5, 129, seed=1, scale=2.0, dtype=dtype, device=device),
        "positions": torch.arange(7, 12, device=device),
        "seed": 1234,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.9,
        "numbers": sampling_numbers(-5, 1.3, 60, 0.8).to(device),
    }


def _tree_attention(dtype: torch.dtype, device: str) -> dict[str, Any]:
    inputs = attention_inputs(2, SMALL_TREE, [3, 9], dtype=dtype, device=device)
    return inputs | {"softcap": 1.5, "sinks": normal(4, seed=3, dtype=dtype, device=device)}


def _write_cache(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "keys": normal(2, 3, 10, 8, seed=1, dtype=dtype, device=device),
        "values": normal(2, 3, 10, 8, seed=2, dtype=dtype, device=device),
        "new_keys": normal(2, 4, 3, 8, seed=3, dtype=dtype, device=device),
        "new_values": normal(2, 4, 3, 8, seed=4, dtype=dtype, device=device),
        "length": torch.tensor([0, 5], device=device),
    }


def _verify_tree(dtype: torch.dtype, device: str) -> dict[str, Any]:
    parents, ancestors, depth = tree(SMALL_TREE, device)
    return {
        "draft": integers(0, 2, 3, 5, seed=1, device=device),
        "target": integers(0, 2, 3, 5, seed=2, device=device),
        "parents": parents,
        "ancestors": ancestors,
        "depth": depth,
    }


def _commit_cache(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "cache": normal(4, 2, 3, 10, 8, seed=1, dtype=dtype, device=device),
        "length": torch.tensor([0, 5], device=device),
        "path": torch.tensor([[0, 1, 3, 4], [0, 2, -1, -1]], dtype=torch.int32, device=device),
        "accepted": torch.tensor([3, 1], dtype=torch.int32, device=device),
    }


def _linear(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "input": normal(5, 129, seed=1, dtype=dtype, device=device),
        "weight": normal(33, 129, seed=2, scale=0.1, dtype=dtype, device=device),
        "bias": normal(33, seed=3, dtype=dtype, device=device),
        "transposed": False,
    }


def _grouped_linear(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {
        "input": normal(4, 2, 129, seed=1, dtype=dtype, device=device),
        "weight": normal(3, 129, 33, seed=2, scale=0.1, dtype=dtype, device=device),
        "bias": normal(3, 33, seed=3, dtype=dtype, device=device),
        "chosen": torch.tensor([[0, 2], [2, 0], [0, 0], [3, -1]], device=device),
        "transposed": True,
    }


def _activation(dtype: torch.dtype, device: str) -> dict[str, Any]:
    return {"input": normal(3, 43, seed=1, scale=3.0, dtype=dtype, device=device), "kind": "gelu_tanh"}


# A correct call of every op, as keyword arguments in the order of its schema.
EXAMPLES: dict[str, Callable[[torch.dtype, str], dict[str, Any]]] = {
    "hidden_entropy": _hidden_entropy,
    "head_stack": _head_stack,
    "draft_topk": _draft_topk,
    "rerank": _rerank,
    "choose_tokens": _choose_tokens,
    "tree_attention": _tree_attention,
    "write_cache": _write_cache,
    "verify_tree": _verify_tree,
    "commit_cache": _commit_cache,
    "linear": _linear,
    "activation": _activation,
    "grouped_linear": _grouped_linear,
}
CPU_ONLY = ("linear", "grouped_linear", "activation")
CUDA_OPS = tuple(op for op in EXAMPLES if op not in CPU_ONLY)


def example(op: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    return EXAMPLES[op](dtype, device)
