"""A text for the tests of tree_attention: its tokens as nodes of trees, or one after the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from op_cases import normal, tree

from cerberus_ext import ops


def make_text(heads: dict, tokens: int, dtype: torch.dtype) -> dict:
    """What the tokens of a text are made of: q, k, v for `tokens` positions, and an empty cache of twice that size."""
    kv_heads, head_size = heads["kv_heads"], heads["head_size"]
    return {
        "q": normal(tokens, heads["query_heads"], head_size, seed=1, scale=2.0, dtype=dtype),
        "k": normal(tokens, kv_heads, head_size, seed=2, dtype=dtype),
        "v": normal(tokens, kv_heads, head_size, seed=3, dtype=dtype),
        "cache": torch.full((2, 1, kv_heads, 2 * tokens, head_size), math.nan, dtype=dtype),
    }


def commit(text: dict, position: int) -> None:
    """Puts a token of the text where it belongs."""
    for plane, name in enumerate("kv"):
        text["cache"][plane, 0, :, position] = text[name][position]


def step(text: dict, length: int, positions: list[int], parents: list[int], window: int, **more: Any) -> torch.Tensor:
    """One forward of the nodes whose tokens are text[positions], after `length` committed tokens -> (N, Hq, E)."""
    keys, values = text["cache"]
    committed = torch.tensor([length])
    ops.write_cache(keys, values, text["k"][positions][None], text["v"][positions][None], committed)
    q = text["q"][positions][None]
    ancestors = tree(parents)[1]
    return ops.tree_attention(q, keys, values, committed, ancestors, q.shape[-1] ** -0.5, window, **more)[0]
