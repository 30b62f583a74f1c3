"""A decoding step's call of every op at a model's sizes, and what plain PyTorch does for the same result.

Where nothing else is said, B = 1 row, a tree of 64 nodes and 2048 committed tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from shapes import Shapes
from torch import Tensor
from torch.nn import functional as F

from cerberus_ext import ops
from cerberus_ext.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests" / "helpers"))
from op_cases import random_parents, tree  # noqa: E402

NODES, LENGTH = 64, 2048
_BLOCK = 1_000_003  # prime, so that no two rows of a matrix are filled with the same numbers
# How far ours may be from PyTorch's, relative to its norm: that rounds to 16 bits in between, too.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Calls:
    """Functions that compute the same, and the bytes that have to be read and written for it at least once."""

    ours: Callable[[], Any]
    eager: Callable[[], Any]
    bytes: int
    # What cuBLAS or SDPA takes for their part of the job, with everything else left out.
    library: Callable[[], Any] | None = None
    # Puts back what the calls move on.
    reset: Callable[[], Any] | None = None
    # How far apart the two results are, 0 being equal; None where a call only writes: that is for the tests.
    difference: Callable[[Any, Any], float] | None = None


def size_of(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    """Normally distributed. On a CPU a gigabyte of weights repeats one block of numbers, to be there in no time."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device != "cpu":
        return out.normal_(std=scale)
    block = (torch.randn(min(_BLOCK, out.numel())) * scale).to(dtype)
    for part in out.view(-1).split(_BLOCK):
        part.copy_(block[: len(part)])
    return out


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the difference over the norm of what is wanted; NaN stays NaN."""
    got, want = got.double(), want.double()
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def integers_differ(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The share of values that are not the same."""
    wrong = sum((g != w).sum().item() for g, w in zip(got, want, strict=True))
    return wrong / sum(g.numel() for g in got)


@cache
def step_tree(nodes: int, device: str) -> tuple[Tensor, Tensor, int]:
    """parents, ancestors, depth"""
    return tree(random_parents(nodes, seed=1), device)


def hidden_entropy(shapes: Shapes, dtype: torch.dtype, device: str) -> Calls:
    hidden = normal(1, shapes.hidden, dtype=dtype, device=device)

    def eager() -> Tensor:
        logp = hidden.float().log_softmax(-1)
        return -(logp.exp() * logp).sum(-1)

    return Calls(lambda: ops.hidden_entropy(hidden), eager, size_of(hidden), difference=relative)


def head_stack(shapes: Shapes, dtype: torch.dtype, device: str, rows: int = 1) -> Calls:
    layers, heads, size = shapes.head_layers, shapes.num_heads, shapes.hidden
    hidden, anchor = (normal(rows, size, dtype=dtype, device=device) for _ in range(2))
    weight = normal(layers, heads, size, 2 * size, scale=0.02, dtype=dtype, device=device)
    bias = normal(layers, heads, size, dtype=dtype, device=device)
    both = torch.cat([hidden, anchor], -1).expand(heads, -1, -1).contiguous()  # (K, B, 2D)

    def eager() -> Tensor:
        states = hidden[:, None].expand(-1, heads, -1)
        first = anchor[:, None]
        for layer in range(layers):
            above = first.expand(-1, heads, -1) if layer == 0 else torch.cat([first, states[:, :-1]], 1)
            x = torch.cat([states, above], -1).transpose(0, 1)  # (K, B, 2D)
            update = torch.baddbmm(bias[layer, :, None], x, weight[layer].transpose(1, 2))
            states = states + F.silu(update).transpose(0, 1)
        return states

    def products() -> None:
        for layer in range(layers):
            torch.bmm(both, weight[layer].transpose(1, 2))

    ours = lambda: ops.head_stack(hidden, anchor, weight, bias)  # noqa: E731
    return Calls(ours, eager, size_of(weight, bias), products, difference=relative)


def draft_topk(
    shapes: Shapes,
    dtype: torch.dtype,
    device: str,
    vocab: int | None = None,
    rows: int = 1,
    drafts: int | None = None,
) -> Calls:
    """vocab: rows of the projection; None: all of the LM head. drafts: of each head; None: the model's."""
    states = normal(rows, shapes.num_heads, shapes.hidden, dtype=dtype, device=device)
    projection = normal(vocab or shapes.vocab, shapes.hidden, scale=0.04, dtype=dtype, device=device)
    drafts = drafts or shapes.drafts

    def eager() -> tuple[Tensor, Tensor]:
        logprobs, ids = F.linear(states, projection).float().log_softmax(-1).topk(drafts)
        return ids, logprobs

    return Calls(
        lambda: ops.draft_topk(states, projection, drafts),
        eager,
        size_of(projection),
        lambda: F.linear(states, projection),
        difference=lambda got, want: relative(got[1], want[1]),  # near ties may change the order of ids
    )


def rerank(shapes: Shapes, dtype: torch.dtype, device: str, rows: int = 1, vocab: int = 15000, rank: int = 64) -> Calls:
    """vocab: of the drafts, of which every head has 32."""
    heads, drafts = shapes.num_heads, 32
    ids = torch.randint(0, vocab, (rows, heads, drafts), device=device)
    logprobs = torch.randn(rows, heads, vocab, device=device).log_softmax(-1)[..., :drafts].contiguous()
    parents = normal(heads - 1, vocab, rank, scale=0.3, dtype=dtype, device=device)
    children = normal(vocab, rank, scale=0.3, dtype=dtype, device=device)
    slopes, rest = torch.ones(heads - 1, device=device), torch.zeros(heads - 1, device=device)
    which = torch.arange(heads - 1, device=device)[:, None]

    def eager() -> Tensor:
        scores = parents[which, ids[:, :-1]] @ children[ids[:, 1:]].transpose(-1, -2)
        plain = logprobs[:, 1:, None]
        left = (1 - plain.exp().sum(-1, keepdim=True)).clamp(min=1e-4).log()
        first = slopes[:, None, None] * plain + scores.float()
        last = (slopes[:, None, None] * left + rest[:, None, None]).expand(*first.shape[:-1], 1)
        return torch.cat([first, last], -1).log_softmax(-1)[..., :-1]

    moved = size_of(ids, logprobs) + rows * (heads - 1) * drafts * (2 * rank * dtype.itemsize + 4 * drafts)
    return Calls(lambda: ops.rerank(ids, logprobs, parents, children, slopes, rest), eager, moved, difference=relative)


def choose_tokens(
    shapes: Shapes,
    dtype: torch.dtype,
    device: str,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    nodes: int = NODES,
) -> Calls:
    logits = normal(nodes, shapes.vocab, scale=3.0, dtype=dtype, device=device)
    positions = torch.arange(nodes, device=device)

    def sampled() -> Tensor:
        scaled = logits.float() / temperature
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], -torch.inf)
        best, ids = scaled.softmax(-1).sort(descending=True)
        best = best.masked_fill(best.cumsum(-1) - best >= top_p, 0.0)
        return ids.gather(-1, best.multinomial(1))[:, 0]

    def same_logits(got: Tensor, want: Tensor) -> float:  # argmax may take any of several equal ones
        return relative(logits.gather(1, got[:, None]), logits.gather(1, want[:, None]))

    ours = lambda: ops.choose_tokens(logits, positions, 1, temperature, top_k, top_p)  # noqa: E731
    if temperature > 0:  # other noise, other tokens
        return Calls(ours, sampled, size_of(logits))
    return Calls(ours, lambda: logits.argmax(-1), size_of(logits), difference=same_logits)


def tree_attention(shapes: Shapes, dtype: torch.dtype, device: str, nodes: int = NODES, length: int = LENGTH) -> Calls:
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    used, size, heads = length + nodes, shapes.head_size, shapes.kv_heads
    capacity = -(-used // 64) * 64
    q = normal(1, nodes, shapes.query_heads, size, **given)
    keys, values = (normal(1, heads, capacity, size, **given) for _ in range(2))
    lengths = torch.tensor([length], device=device)
    ancestors = step_tree(nodes, device)[1]
    # What a decoding loop without the op has at hand once per step: the mask, and the used part of the cache.
    mask = reference.visible_slots(lengths, ancestors, used, 0)[:, None]
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask, scale=size**-0.5)
    k, v = keys[:, :, :used], values[:, :, :used]
    # Not every kernel of SDPA shares keys among query heads. With keys and values repeated beforehand, all can be used.
    group = shapes.query_heads // heads
    all_k, all_v = (x.repeat_interleave(group, 1) for x in (k, v))

    def eager() -> Tensor:
        return attend(q.transpose(1, 2), k, v, enable_gqa=True).transpose(1, 2).contiguous()

    return Calls(
        lambda: ops.tree_attention(q, keys, values, lengths, ancestors, size**-0.5, 0),
        eager,
        2 * heads * used * size * q.element_size() + 2 * size_of(q),
        lambda: attend(q.transpose(1, 2), all_k, all_v),
        difference=relative,
    )


def write_cache(shapes: Shapes, dtype: torch.dtype, device: str) -> Calls:
    given: dict[str, Any] = {"dtype": dtype, "device": device}
    keys, values = (normal(1, shapes.kv_heads, LENGTH + NODES, shapes.head_size, **given) for _ in range(2))
    new_keys, new_values = (normal(1, NODES, shapes.kv_heads, shapes.head_size, **given) for _ in range(2))
    length = torch.tensor([LENGTH], device=device)
    slots = length + torch.arange(NODES, device=device)

    def eager() -> None:
        keys.index_copy_(2, slots, new_keys.transpose(1, 2))
        values.index_copy_(2, slots, new_values.transpose(1, 2))

    ours = lambda: ops.write_cache(keys, values, new_keys, new_values, length)  # noqa: E731
    return Calls(ours, eager, 2 * size_of(new_keys, new_values))


def verify_tree(shapes: Shapes, dtype: torch.dtype, device: str) -> Calls:
    """Neither shapes nor dtype play a part."""
    parents, ancestors, depth = step_tree(NODES, device)
    draft, target = (torch.randint(0, 2, (1, NODES), device=device) for _ in range(2))
    # What a tree holds once for all steps.
    on_path = reference.is_ancestor(ancestors, NODES)
    depths = on_path.sum(-1) - 1
    up = parents.clamp(min=0)
    places = torch.arange(depth + 1, device=device)
    nodes = torch.arange(NODES, device=device)
    is_root = nodes == 0

    def eager() -> tuple[Tensor, Tensor]:
        fits = (draft == target[:, up]) | is_root
        right = (fits[:, None] | ~on_path).all(-1)
        reach = torch.where(right, depths, -1)
        best = (reach * NODES - nodes).argmax(-1)  # the lowest node of the deepest ones
        order = torch.where(on_path[best], nodes, NODES).sort(-1).values[:, : depth + 1]
        accepted = depths[best]
        return torch.where(places <= accepted[:, None], order, -1).int(), accepted.int()

    ours = lambda: ops.verify_tree(draft, target, parents, ancestors, depth)  # noqa: E731
    return Calls(ours, eager, size_of(draft, target, parents, ancestors), difference=integers_differ)


def commit_cache(shapes: Shapes, dtype: torch.dtype, device: str) -> Calls:
    """Moves four of five slots, in all layers, further each time until `reset`."""
    planes, moved = 2 * shapes.layers, 4
    spare = 64 * (moved + 1)  # calls without a reset
    cache = normal(planes, 1, shapes.kv_heads, NODES + spare, shapes.head_size, dtype=dtype, device=device)
    length = torch.zeros(1, dtype=torch.int64, device=device)
    path = torch.tensor([[0, 2, 7, 11, 19]], dtype=torch.int32, device=device)
    accepted = torch.tensor([moved], dtype=torch.int32, device=device)
    places = torch.arange(moved + 1, device=device)

    def eager() -> None:
        rows = cache[:, 0]
        rows.index_copy_(2, length + places, rows.index_select(2, length + path[0].long()))
        length.add_(accepted + 1)

    slots = 2 * planes * shapes.kv_heads * shapes.head_size * moved  # read and written
    return Calls(
        lambda: ops.commit_cache(cache, length, path, accepted),
        eager,
        slots * cache.element_size(),
        reset=length.zero_,
    )


def after_forward(shapes: Shapes, dtype: torch.dtype, device: str) -> Calls:
    """What a step does besides its forward and its heads: entropy, choosing, verifying, committing, in this order."""
    make = (hidden_entropy, choose_tokens, verify_tree, commit_cache)
    parts = [one(shapes, dtype, device) for one in make]

    def all_of(name: str) -> Callable[[], None]:
        calls = [getattr(part, name) for part in parts]

        def run() -> None:
            for call in calls:
                call()

        return run

    moved = sum(part.bytes for part in parts)
    return Calls(all_of("ours"), all_of("eager"), moved, reset=parts[-1].reset)


def linear(shapes: Shapes, dtype: torch.dtype, device: str, rows: int = 1, outputs: int | None = None) -> Calls:
    """outputs: None: into the model's MLP."""
    input = normal(rows, shapes.hidden, dtype=dtype, device=device)
    weight = normal(outputs or shapes.intermediate, shapes.hidden, scale=0.04, dtype=dtype, device=device)
    moved = size_of(input, weight) + rows * weight.shape[0] * input.element_size()
    return Calls(lambda: ops.linear(input, weight, None), lambda: F.linear(input, weight), moved, difference=relative)


def activation(shapes: Shapes, dtype: torch.dtype, device: str, rows: int = 1, kind: str = "silu") -> Calls:
    """What stands between the two products of an MLP."""
    input = normal(rows, shapes.intermediate, dtype=dtype, device=device)
    eager = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}[kind]
    return Calls(lambda: ops.activation(input, kind), lambda: eager(input), 2 * size_of(input), difference=relative)


def weight_bytes(op: str, shapes: Shapes, dtype: torch.dtype) -> int:
    """About what a call's largest tensors take: to know beforehand whether they fit."""
    size = shapes.hidden
    elements = {
        "head_stack": shapes.head_layers * shapes.num_heads * 2 * size * size,
        "draft_topk": shapes.vocab * size,
        "choose_tokens": 8 * NODES * shapes.vocab,  # sorting makes copies
        "linear": shapes.intermediate * size,
    }
    return elements.get(op, 0) * dtype.itemsize
