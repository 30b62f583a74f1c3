"""One step's call of every op at the sizes of SmolLM2-135M, and what plain PyTorch does for the same result.

Sizes: D 576, V 49152, 9 query heads over 3 key/value heads of 64, 30 layers; K = 4 heads of L = 2 layers, a tree of 32
nodes, 512 committed tokens of 1024.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from op_cases import integers, normal, random_parents, tree
from torch import Tensor
from torch.nn import functional as F

from cerberus_ext import ops, reference

D, V, HQ, HKV, E, LAYERS = 576, 49152, 9, 3, 64, 30
K, L, P = 4, 2, 8
NODES, LENGTH, CAPACITY = 32, 512, 1024


@dataclass(frozen=True)
class Calls:
    """Two functions that compute the same, and the bytes that have to be read and written for it at least once."""

    ours: Callable[[], Any]
    eager: Callable[[], Any]
    bytes: int


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def hidden_entropy(dtype: torch.dtype, device: str) -> Calls:
    hidden = normal(1, D, dtype=dtype, device=device)

    def eager() -> Tensor:
        logp = hidden.float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    return Calls(lambda: ops.hidden_entropy(hidden), eager, size_of(hidden))


def head_stack(dtype: torch.dtype, device: str) -> Calls:
    hidden, anchor = (normal(1, D, seed=seed, dtype=dtype, device=device) for seed in (1, 2))
    weight = normal(L, K, D, 2 * D, seed=3, scale=0.02, dtype=dtype, device=device)
    bias = normal(L, K, D, seed=4, dtype=dtype, device=device)

    def eager() -> Tensor:
        states = hidden[:, None].expand(-1, K, -1)
        for layer in range(L):
            above = anchor[:, None].expand(-1, K, -1) if layer == 0 else torch.cat([anchor[:, None], states[:, :-1]], 1)
            x = torch.cat([states, above], -1).transpose(0, 1)  # (K, B, 2D)
            update = torch.baddbmm(bias[layer, :, None], x, weight[layer].transpose(1, 2))
            states = states + F.silu(update).transpose(0, 1)
        return states

    return Calls(lambda: ops.head_stack(hidden, anchor, weight, bias), eager, size_of(weight, bias))


def draft_topk(dtype: torch.dtype, device: str) -> Calls:
    states = normal(1, K, D, seed=1, dtype=dtype, device=device)
    projection = normal(V, D, seed=2, scale=0.04, dtype=dtype, device=device)

    def eager() -> tuple[Tensor, Tensor]:
        logprobs, ids = F.linear(states, projection).float().log_softmax(-1).topk(P)
        return ids, logprobs

    return Calls(lambda: ops.draft_topk(states, projection, P), eager, size_of(projection))


def choose_tokens(temperature: float, top_k: int, top_p: float) -> Callable[[torch.dtype, str], Calls]:
    def calls(dtype: torch.dtype, device: str) -> Calls:
        logits = normal(NODES, V, scale=3.0, dtype=dtype, device=device)
        positions = torch.arange(NODES, device=device)

        def sampled() -> Tensor:
            scaled = logits.float() / temperature
            scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
            best, ids = scaled.softmax(-1).sort(descending=True)
            best = best.masked_fill(best.cumsum(-1) - best >= top_p, 0.0)
            return ids.gather(-1, best.multinomial(1))[:, 0]

        eager = sampled if temperature > 0 else lambda: logits.argmax(-1)
        ours = lambda: ops.choose_tokens(logits, positions, 1, temperature, top_k, top_p)  # noqa: E731
        return Calls(ours, eager, size_of(logits))

    return calls


def step_tree(device: str) -> tuple[Tensor, Tensor, int]:
    return tree(random_parents(NODES, seed=1), device)


def tree_attention(dtype: torch.dtype, device: str) -> Calls:
    given = {"dtype": dtype, "device": device}
    q = normal(1, NODES, HQ, E, seed=1, **given)
    keys, values = (normal(1, HKV, CAPACITY, E, seed=seed, **given) for seed in (2, 3))
    length = torch.tensor([LENGTH], device=device)
    _, ancestors, _ = step_tree(device)
    used = LENGTH + NODES
    # What a decoding loop without the op has at hand once per step: the mask, and the used part of the cache.
    mask = reference.visible_slots(length, ancestors, used, 0)[:, None]

    def eager() -> Tensor:
        k, v = keys[:, :, :used], values[:, :, :used]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=E**-0.5, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    moved = 2 * HKV * used * E * q.element_size() + 2 * size_of(q)
    return Calls(lambda: ops.tree_attention(q, keys, values, length, ancestors, E**-0.5, 0), eager, moved)


def write_cache(dtype: torch.dtype, device: str) -> Calls:
    given = {"dtype": dtype, "device": device}
    keys, values = (normal(1, HKV, CAPACITY, E, seed=seed, **given) for seed in (1, 2))
    new_keys, new_values = (normal(1, NODES, HKV, E, seed=seed, **given) for seed in (3, 4))
    length = torch.tensor([LENGTH], device=device)
    slots = length + torch.arange(NODES, device=device)

    def eager() -> None:
        keys.index_copy_(2, slots, new_keys.transpose(1, 2))
        values.index_copy_(2, slots, new_values.transpose(1, 2))

    ours = lambda: ops.write_cache(keys, values, new_keys, new_values, length)  # noqa: E731
    return Calls(ours, eager, 2 * size_of(new_keys, new_values))


def verify_tree(dtype: torch.dtype, device: str) -> Calls:
    """dtype plays no part."""
    parents, ancestors, depth = step_tree(device)
    draft, target = (integers(0, 2, 1, NODES, seed=seed, device=device) for seed in (1, 2))
    # What a tree holds once for all steps.
    on_path = reference.is_ancestor(ancestors, NODES)
    depths = on_path.sum(-1) - 1
    up = parents.clamp(min=0)
    places = torch.arange(depth + 1, device=device)

    def eager() -> tuple[Tensor, Tensor]:
        fits = draft == target[:, up]
        fits[:, 0] = True
        right = (fits[:, None] | ~on_path).all(-1)
        best = torch.where(right, depths, -1).argmax(-1)
        order = torch.where(on_path[best], torch.arange(NODES, device=device), NODES).sort(-1).values[:, : depth + 1]
        accepted = depths[best]
        return torch.where(places <= accepted[:, None], order, -1).int(), accepted.int()

    ours = lambda: ops.verify_tree(draft, target, parents, ancestors, depth)  # noqa: E731
    return Calls(ours, eager, size_of(draft, target, parents, ancestors))


def commit_cache(dtype: torch.dtype, device: str) -> Calls:
    """Every call moves the same four of five slots; the length is put back, on both sides."""
    cache = normal(2 * LAYERS, 1, HKV, CAPACITY, E, dtype=dtype, device=device)
    length = torch.tensor([LENGTH], device=device)
    path = torch.tensor([[0, 2, 7, 11, 19]], dtype=torch.int32, device=device)
    accepted = torch.tensor([4], dtype=torch.int32, device=device)

    def ours() -> None:
        length.fill_(LENGTH)
        ops.commit_cache(cache, length, path, accepted)

    def eager() -> None:
        length.fill_(LENGTH)
        count = int(accepted) + 1
        start = int(length)
        cache[:, 0, :, start : start + count] = cache[:, 0, :, start + path[0, :count]]
        length.add_(count)

    return Calls(ours, eager, 2 * 2 * LAYERS * HKV * E * 4 * cache.element_size())


def linear(rows: int, outputs: int) -> Callable[[torch.dtype, str], Calls]:
    def calls(dtype: torch.dtype, device: str) -> Calls:
        input = normal(rows, D, seed=1, dtype=dtype, device=device)
        weight = normal(outputs, D, seed=2, scale=0.04, dtype=dtype, device=device)
        moved = size_of(input, weight) + rows * outputs * input.element_size()
        return Calls(lambda: ops.linear(input, weight, None), lambda: F.linear(input, weight), moved)

    return calls


CALLS: dict[str, Callable[[torch.dtype, str], Calls]] = {
    "hidden_entropy": hidden_entropy,
    "head_stack": head_stack,
    "draft_topk": draft_topk,
    "choose_tokens greedy": choose_tokens(0.0, 0, 1.0),
    "choose_tokens sampled": choose_tokens(0.8, 50, 0.95),
    "tree_attention": tree_attention,
    "write_cache": write_cache,
    "verify_tree": verify_tree,
    "commit_cache": commit_cache,
    "linear 1 x 576 -> 1536": linear(1, 1536),
    "linear 32 x 576 -> 1536": linear(32, 1536),
    "linear 32 x 576 -> 49152": linear(32, V),
}
