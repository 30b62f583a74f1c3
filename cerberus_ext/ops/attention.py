"""Attention over a tree of drafts, and the cache that it reads."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import fake, native


def tree_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    ancestors: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of tree nodes to the committed tokens and to their own ancestors, themselves included.

    q: (B, N, Hq, E) float32 | bfloat16 | float16, contiguous, with the positional encoding applied.
    keys, values: (B, Hkv, S, E), Hkv divides Hq: slots 0 .. length hold the committed tokens, length ..
        length + N the nodes (`write_cache` put them there); what the other slots hold is never read into the
        result.
    length: (B,) int64, 0 <= length <= S - N.
    ancestors: (N, W) int64 bit mask: bit j of row i says that node j is on the path from the root to i, i
        included.
    scale: multiplies q k; finite in float32.
    window: a node at position p sees the positions > p - window; <= 0: all. Node i is at length + its depth.
    softcap: > 0: the score is softcap * tanh(scale q k / softcap) (Gemma 2); 0: scale q k. Finite in float32.
    sinks: (Hq,) of q's dtype or None: one more logit of each query head, which takes its share of the softmax and
        has no value (gpt_oss).
    Returns (B, N, Hq, E) of q's dtype. A node that sees no slot gives 0.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on numbers out of range.
    """
    return native.tree_attention(q, keys, values, length, ancestors, scale, window, softcap, sinks)


@fake(tree_attention, "q BNHE, keys BHSE, values BHSE, length B, ancestors NW, sinks? H")
def _(q: Tensor, *_: object) -> Tensor:
    return torch.empty_like(q)


def write_cache(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, length: Tensor) -> None:
    """Puts the keys and values of a step's nodes behind the committed ones: node i into slot length + i.

    keys, values: (B, Hkv, S, E) float32 | bfloat16 | float16, contiguous; changed in place.
    new_keys, new_values: (B, N, Hkv, E).
    length: (B,) int64, >= 0. Nodes whose slot would be outside of the cache are left out.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    native.write_cache(keys, values, new_keys, new_values, length)


@fake(write_cache, "keys BHSE, values BHSE, new_keys BNHE, new_values BNHE, length B")
def _(*_: object) -> None: ...


def commit_cache(cache: Tensor, length: Tensor, path: Tensor, accepted: Tensor) -> None:
    """Moves the accepted path's keys and values next to the committed ones and advances length over them.

    cache: (C, B, Hkv, S, E) float32 | bfloat16 | float16, contiguous; slot length + path[j] of each row moves
        to slot length + j, in every plane, in place.
    length: (B,) int64; becomes length + accepted + 1.
    path: (B, depth + 1) int32 and accepted: (B,) int32, as `verify_tree` returns them.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    native.commit_cache(cache, length, path, accepted)


@fake(commit_cache, "cache CBHSE, length B, path BP, accepted B")
def _(*_: object) -> None: ...
