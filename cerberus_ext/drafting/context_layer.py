"""The context layer: one causal transformer layer over the text so far, in front of the heads.

Every token of the text makes a pair with the hidden state that produced it (zeros before the first token):

    z       = concat(h, anchor)             anchor: the token's embedding, scaled as in the heads
    q, k, v = qkv @ z                       q and k are rotated to the token's position (RoPE)
    y       = h + output @ attention(q, the k and v of all pairs up to this one)
    x       = y + silu(mixer @ concat(y, anchor) + bias)

x takes the place of h in the formula of the heads (docs/design.md, "Heads"). Keys and values lie in a layer of their
own in the decode's cache, slot for slot beside the target model's: the pairs of a tree's nodes are written with the
nodes, and kept or forgotten with them.

Letters: B rows, N nodes, D hidden size, Hq / Hkv attention heads, E head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

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


class BoundContext:
    """A context layer bound to a model. Its tensors are the drafter's, and shared with it.

    anchor_scale (): see CerberusHeads; embeddings (V, D).
    """

    def __init__(
        self, sizes: tuple[int, int, int], parameters: dict[str, Tensor], embeddings: Tensor, anchor_scale: Tensor
    ) -> None:
        """parameters: of a ContextLayer, by name."""
        self.sizes = sizes
        self.qkv, self.output, self.mixer, self.bias = (parameters[name] for name in ("qkv", "output", "mixer", "bias"))
        self.key_value = self.qkv[sizes[0] * sizes[2] :]  # its rows for keys and values, in the same memory
        self.embeddings, self.anchor_scale = embeddings, anchor_scale

    def keep_prompt(self, cache: TreeCache, hidden: Tensor, tokens: Tensor) -> None:
        """Puts the prompt's pairs into the cache. hidden (B, T, D): what each token (B, T) led to."""
        before = torch.cat([torch.zeros_like(hidden[:, :1]), hidden[:, :-1]], 1)
        begin = torch.zeros_like(cache.length)
        positions = begin[:, None] + torch.arange(tokens.shape[1], device=begin.device)
        self._keep(self.key_value, cache, begin, positions, before, tokens)

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        """Puts the pairs of a tree's nodes into the cache, behind what is committed.

        before (B, D): what the pending token was chosen from; hidden (B, N, D): what the nodes' tokens (B, N) led to.
        """
        # Not hidden[:, parents]: torch wakes threads for a few rows, which then spin on a core that others need.
        parents = hidden.index_select(1, tree.parents[1:])
        led = torch.cat([before[:, None], parents], 1)
        self._keep(self.key_value, cache, cache.length, cache.length[:, None] + tree.depths, led, tokens)

    def read(
        self, cache: TreeCache, before: Tensor, tokens: Tensor, tree: Topology, begin: Tensor | None = None
    ) -> Tensor:
        """What the heads read, (B, N, D), where the states `before` (B, N, D) led to the tree's `tokens` (B, N).

        Their pairs are put into the cache from slot `begin` (B,) on; None: behind what is committed.
        """
        begin = cache.length if begin is None else begin
        q, anchor = self._keep(self.qkv, cache, begin, begin[:, None] + tree.depths, before, tokens)
        keys, values = cache.context_planes()
        scale = self.sizes[2] ** -0.5
        rows = ops.tree_attention(q.to(keys.dtype), keys, values, begin, tree.ancestors, scale, 0).flatten(2)
        state = before.to(anchor.dtype) + product(rows.to(anchor.dtype), self.output)
        return state + F.silu(product(torch.cat([state, anchor], -1), self.mixer) + self.bias)

    def _keep(
        self, weight: Tensor, cache: TreeCache, begin: Tensor, positions: Tensor, before: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Puts pairs into slots begin, begin + 1 ... -> their queries (B, N, Hq, E) and anchors (B, N, D).

        weight: qkv, or key_value where nobody asks: then there are no queries, (B, N, 0, E).
        begin (B,), positions (B, N), before (B, N, D), tokens (B, N).
        """
        _, kv_heads, size = self.sizes
        anchor = F.embedding(tokens, self.embeddings).to(weight.dtype) * self.anchor_scale
        found = product(torch.cat([before.to(weight.dtype), anchor], -1), weight).unflatten(-1, (-1, size))
        turned = rotate(found[:, :, :-kv_heads], positions)
        q, new_keys = turned.split([turned.shape[2] - kv_heads, kv_heads], 2)
        keys, values = cache.context_planes()
        new_keys, new_values = (part.to(keys.dtype).contiguous() for part in (new_keys, found[:, :, -kv_heads:]))
        ops.write_cache(keys, values, new_keys, new_values, begin)
        return q.contiguous(), anchor


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (B, N, I) @ weight (O, I)^T. On a CPU a row does not depend on the others, as everywhere in a step."""
    if rows.device.type != "cpu":
        return F.linear(rows, weight)
    return ops.linear(rows.flatten(0, 1).contiguous(), weight, None).unflatten(0, rows.shape[:2])


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
    return heads, kv_heads, getattr(config, "head_dim", None) or config.hidden_size // heads
