"""The context layer with a gradient, for positions drawn from all over the data: what `BoundContext.read` computes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting.context_layer import ContextLayer, rotate
from .positions import Positions


@dataclass
class Reach:
    """What the positions of S segments, G each, see of their lines.

    A segment's columns are the data's rows from the beginning of its first line to its last position; those of all
    segments follow each other.

    hidden (R, D) bfloat16, tokens (R,), places (R,): see `Positions`.
    columns (S, T) int64: where each column of a segment stands in them, filled up with 0.
    queries (S * G,) int64: where the segments' own positions stand in them.
    sees (S, G, T) bool: the columns of the same line, up to the position itself.
    """

    hidden: Tensor
    tokens: Tensor
    places: Tensor
    columns: Tensor
    queries: Tensor
    sees: Tensor


def reach_of(data: Positions, rows: Tensor, device: torch.device) -> Reach:
    """rows (S, G): the positions' rows in the data, ascending."""
    first = rows[:, 0] - data.places[rows[:, 0]]
    counts = rows[:, -1] + 1 - first
    begins = counts.cumsum(0) - counts
    offsets = torch.arange(int(counts.max()))
    inside = offsets < counts[:, None]  # (S, T)
    columns = torch.where(inside, begins[:, None] + offsets, 0)
    source = (first[:, None] + offsets)[inside]  # (R,)
    lines = data.lines[(first[:, None] + offsets).clamp(max=len(data.lines) - 1)]  # (S, T)
    own = rows - first[:, None]  # (S, G): columns of the positions themselves
    sees = (offsets <= own[:, :, None]) & (lines[:, None] == data.lines[rows][:, :, None])
    queries = (begins[:, None] + own).flatten()
    reach = Reach(data.hidden[source], data.tokens[source], data.places[source], columns, queries, sees)
    return Reach(*(getattr(reach, field.name).to(device) for field in fields(reach)))


def context_states(layer: ContextLayer, reach: Reach, anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the heads read, (S * G, D) float32. anchor (R, D) float32, of the reach's tokens. dtype: of the products.

    No gradient flows to the anchor: its scale is one number, which the heads themselves learn.
    """
    heads, kv_heads, size = layer.sizes
    segments, width, _ = reach.sees.shape
    hidden, anchor = reach.hidden.float(), anchor.detach()
    pairs = torch.cat([hidden, anchor], -1).to(dtype)
    of_queries, of_keys = layer.qkv.to(dtype).split([heads * size, 2 * kv_heads * size])
    q = (pairs[reach.queries] @ of_queries.T).float().view(-1, heads, size)
    keys, values = (pairs @ of_keys.T).float().view(-1, 2, kv_heads, size).unbind(1)
    q = rotate(q, reach.places[reach.queries]).view(segments, width, heads, size)
    keys, values = (part[reach.columns].transpose(1, 2) for part in (rotate(keys, reach.places), values))
    found = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=reach.sees[:, None], scale=size**-0.5, enable_gqa=True
    )  # (S, Hq, G, E)
    found = found.transpose(1, 2).reshape(segments * width, heads * size)
    state = hidden[reach.queries] + (found.to(dtype) @ layer.output.to(dtype).T).float()
    inputs = torch.cat([state, anchor[reach.queries]], -1)
    return state + F.silu((inputs.to(dtype) @ layer.mixer.to(dtype).T).float() + layer.bias)
