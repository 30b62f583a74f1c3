"""The context layer: one causal transformer layer over the text so far, in front of the heads.

Every token of the text makes a pair with the hidden state that produced it (zeros before the first token):

    z       = concat(h, anchor)             anchor: the token's embedding, scaled as in the heads
    q, k, v = qkv @ z                       q and k are rotated to the token's position (RoPE)
    y       = h + output @ attention(q, the k and v of all pairs up to this one)
    x       = y + silu(mixer @ concat(y, anchor) + bias)

x takes the place of h in the formula of the heads (docs/design.md, "Heads"). Keys and values lie in a layer of their
own in the decode's cache, slot for slot beside the target model's: the pairs of a tree's nodes are written with the
nodes, and kept or forgotten with them. On a CPU, a ContextForward writes only the accepted nodes', later.

Letters: B rows, N nodes, D hidden size, Hq / Hkv attention heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.draft import eight_bit_linear

if TYPE_CHECKING:
    from ..target.attention import Topology
    from ..target.cache import TreeCache

ROPE_BASE = 10000.0


class ContextLayer(nn.Module):
    """qkv ((Hq + 2 Hkv) E, 2D), output (D, Hq E), mixer (D, 2D), bias (D). New ones hand the hidden state on as it is.

    sizes: Hq, Hkv, E.
    """

    def __init__(self, size: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.sizes = sizes
        heads, kv_heads, head_size = sizes
        self.qkv = nn.Parameter(torch.zeros((heads + 2 * kv_heads) * head_size, 2 * size))
        self.output = nn.Parameter(torch.zeros(size, heads * head_size))
        self.mixer = nn.Parameter(torch.zeros(size, 2 * size))
        self.bias = nn.Parameter(torch.zeros(size))

    def draw(self, hidden_rms: float, seed: int) -> None:
        """Random queries, keys and values, of about 1 each where the hidden states have this root mean square.

        What is zero stays so, and with it the layer's effect: with zeros everywhere nothing would ever be learned.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.qkv.normal_(0, 1 / (hidden_rms * self.qkv.shape[1] ** 0.5), generator=generator)


class ContextForward:
    """Does in a BoundContext's place what one text's steps ask for. To write one, override `keep_nodes` and `read`."""

    def keep_prompt(self, cache: TreeCache) -> None:
        """The pairs of all tokens in the cache have been put there."""

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        """As BoundContext.keep_nodes, of one row. Pairs may also wait until `read`."""
        raise NotImplementedError

    def keep_path(self, hidden: Tensor, tokens: Tensor, path: Tensor) -> None:
        """After keep_nodes. hidden (N, D) of the nodes, tokens (N,), path (N,): those that were accepted, then -1."""

    def kept(self, cache: TreeCache) -> int:
        """Of so many tokens, from the text's beginning on, the pairs are in the cache."""
        return cache.committed

    def read(self, cache: TreeCache, before: Tensor, pending: Tensor) -> Tensor:
        """What the heads read, (1, D). before (1, D): what pending (1,) was chosen from."""
        raise NotImplementedError

    def read_together(self, texts: Sequence[tuple[Any, TreeCache, Tensor, Tensor]]) -> Tensor:
        """(B, D): the same of several texts, each with the one that does its steps, of the same layer."""
        return torch.cat([forward.read(*text) for forward, *text in texts])


class BoundContext:
    """A context layer bound to a model. Its tensors are the drafter's, and shared with it.

    tensors: of a ContextLayer, by name, with anchor_scale (), see CerberusHeads, and embeddings (V, D).
    packed: what it multiplies with in their place, by name, with key_value, rows of qkv; None: they themselves.
    fused: does the steps of a decode, where there is one: what is read is then the pending token alone.
    """

    def __init__(
        self, sizes: tuple[int, int, int], tensors: dict[str, Tensor], packed: dict[str, Tensor] | None = None
    ) -> None:
        self.sizes, self.tensors, self.packed = sizes, tensors, packed
        self.embeddings, self.bias = tensors["embeddings"], tensors["bias"]
        self.anchor_scale = tensors["anchor_scale"].view(1)  # of () a program would keep the number, not the tensor
        self._weights = weights_of(sizes, tensors)
        self.fused: ContextForward | None = None

    @property
    def read_tensors(self) -> list[Tensor]:
        """All that it reads, or a program that is made of it."""
        weights = [*self._weights.values(), *(self.packed or {}).values()]
        return [*weights, self.bias, self.embeddings, self.anchor_scale]

    def keep_prompt(self, cache: TreeCache, hidden: Tensor, tokens: Tensor) -> None:
        """Puts the pairs of the cache's last tokens (B, T) into it. hidden (B, T, D): what each of them led to.

        Where they are not all that it holds, the first one's pair is there already.
        """
        first = int(cache.committed > tokens.shape[1])
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)[:, first:]
        tokens = tokens[:, first:]
        begin = cache.length - tokens.shape[1]
        positions = begin[:, None] + torch.arange(tokens.shape[1], device=begin.device)
        self.keep_pairs("key_value", cache.context_planes(), begin, positions, before, tokens)
        if self.fused is not None:
            self.fused.keep_prompt(cache)

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        """Puts the pairs of a tree's nodes into the cache, behind what is committed.

        before (B, D): what the pending token was chosen from; hidden (B, N, D): what the nodes' tokens (B, N) led to.
        """
        if self.fused is not None:
            return self.fused.keep_nodes(cache, before, hidden, tokens, tree)
        # Not hidden[:, parents]: torch wakes threads for a few rows, which then spin on a core that others need.
        parents = hidden.index_select(1, tree.parents[1:])
        led = torch.cat([before[:, None], parents], 1)
        positions = cache.length[:, None] + tree.depths
        self.keep_pairs("key_value", cache.context_planes(), cache.length, positions, led, tokens)

    def read(
        self, cache: TreeCache, before: Tensor, tokens: Tensor, tree: Topology, begin: Tensor | None = None
    ) -> Tensor:
        """What the heads read, (B, N, D), where the states `before` (B, N, D) led to the tree's `tokens` (B, N).

        Their pairs are put into the cache from slot `begin` (B,) on; None: behind what is committed.
        """
        if self.fused is not None:
            return self.fused.read(cache, before[0], tokens[0])[None]
        begin = cache.length if begin is None else begin
        positions = begin[:, None] + tree.depths
        return self.compute(cache.context_planes(), begin, positions, before, tokens, tree.ancestors)

    def compute(
        self, planes: tuple[Tensor, Tensor], begin: Tensor, positions: Tensor, before: Tensor, tokens: Tensor,
        ancestors: Tensor,
    ) -> Tensor:  # fmt: skip
        """planes (B, Hkv, S, E): keys and values; begin (B,), positions (B, N), before (B, N, D), tokens (B, N),
        ancestors (N, W) -> x (B, N, D)."""
        q, anchor = self.keep_pairs("qkv", planes, begin, positions, before, tokens)
        q, scale = q.to(planes[0].dtype), self.sizes[2] ** -0.5
        rows = ops.tree_attention(q, *planes, begin, ancestors, scale, 0).flatten(2)
        state = before.to(anchor.dtype) + self._product(rows.to(anchor.dtype), "output")
        return state + silu(self._product(torch.cat([state, anchor], -1), "mixer") + self.bias)

    def keep_pairs(
        self, weight: str, planes: tuple[Tensor, Tensor], begin: Tensor, positions: Tensor, before: Tensor,
        tokens: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Puts pairs into slots begin, begin + 1 ... -> their queries (B, N, Hq, E) and anchors (B, N, D).

        weight: "qkv", or "key_value" where nobody asks: then there are no queries, (B, N, 0, E).
        """
        _, kv_heads, size = self.sizes
        anchor = F.embedding(tokens, self.embeddings).to(self.bias.dtype) * self.anchor_scale
        inputs = torch.cat([before.to(self.bias.dtype), anchor], -1)
        found = self._product(inputs, weight).unflatten(-1, (-1, size))
        turned = rotate(found[:, :, :-kv_heads], positions)
        q, keys = turned.split([turned.shape[2] - kv_heads, kv_heads], 2)
        keys, values = (part.to(planes[0].dtype).contiguous() for part in (keys, found[:, :, -kv_heads:]))
        ops.write_cache(*planes, keys, values, begin)
        return q.contiguous(), anchor

    def _product(self, rows: Tensor, name: str) -> Tensor:
        """rows (B, N, I) times a weight -> (B, N, O). On a CPU a row does not depend on the others, as everywhere in a
        step."""
        weight = self._weights[name]
        if rows.device.type != "cpu":
            return F.linear(rows, weight)
        flat = rows.flatten(0, 1).contiguous()
        if self.packed is None:
            return ops.linear(flat, weight, None).unflatten(0, rows.shape[:2])
        return eight_bit_linear(flat, self.packed[name], len(weight)).unflatten(0, rows.shape[:2])

    def like(self, tensors: dict[str, Tensor]) -> BoundContext:
        """The same layer with other tensors, which it multiplies with as they are."""
        return BoundContext(self.sizes, tensors)


def silu(rows: Tensor) -> Tensor:
    """On a CPU an element does not depend on the others, as everywhere in a step."""
    return F.silu(rows) if rows.device.type != "cpu" else ops.activation(rows.contiguous(), "silu")


def weights_of(sizes: tuple[int, int, int], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer of these sizes multiplies with; key_value: rows of qkv, in the same memory."""
    weights = {name: tensors[name] for name in ("qkv", "output", "mixer")}
    return weights | {"key_value": weights["qkv"][sizes[0] * sizes[2] :]}


def rotate(rows: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding in float32, -> the dtype of rows. rows (..., H, E), positions (...) int64."""
    half = rows.shape[-1] // 2
    frequencies = ROPE_BASE ** (torch.arange(half, device=rows.device, dtype=torch.float32) / -half)
    angles = (positions[..., None].float() * frequencies)[..., None, :]  # (..., 1, E / 2)
    first, second = rows.float().split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(rows.dtype)


def check_has_anchor(who: str, anchor: str, chained: bool) -> None:
    """Raises ValueError, in `who`'s name, for heads without the pending token's embedding: a context layer reads it."""
    if anchor != "root" or not chained:
        raise ValueError(f'{who}: context_layer must be False without chained heads and anchor "root"')


def attention_sizes(model: Any) -> tuple[int, int, int]:
    """Query heads, key heads and head size of a transformers model's attention: Hq, Hkv, E."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1  # of Falcon and GPT BigCode, whatever they say beside it
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
