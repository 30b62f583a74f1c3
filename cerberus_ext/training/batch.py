"""What one step reads: segments of the window that is in memory, and what a context layer sees of their lines."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .options import SEGMENT
from .positions import Positions


@dataclass
class Reach:
    """What the positions of S segments, G each, see of their lines.

    A segment's columns are the data's rows from the beginning of its first line to its last position; those of all
    segments follow each other.

    hidden (R, D) bfloat16, tokens (R,), offsets (R,): see `Positions`.
    columns (S, T) int64: where each column of a segment stands in them, filled up with 0.
    queries (S * G,) int64: where the segments' own positions stand in them.
    sees (S, G, T) bool: the columns of the same line, up to the position itself.
    """

    hidden: Tensor
    tokens: Tensor
    offsets: Tensor
    columns: Tensor
    queries: Tensor
    sees: Tensor


def reach_of(data: Positions, rows: Tensor, device: torch.device) -> Reach:
    """rows (S, G): the positions' rows in the data, ascending."""
    first = rows[:, 0] - data.offsets[rows[:, 0]]
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
    reach = Reach(data.hidden[source], data.tokens[source], data.offsets[source], columns, queries, sees)
    return Reach(*(getattr(reach, field.name).to(device) for field in fields(reach)))


@dataclass
class Batch:
    """Segments of consecutive answer tokens, all on the device.

    hidden (S, SEGMENT + K, D) bfloat16, tokens (S, SEGMENT + K) int64: also of the K positions after, where the
    teachers of the last ones are; left (S, SEGMENT) int64, see `Positions`. Rows beyond the end of the data, or of
    another answer, are there but are left out by `left`. reach: what a context layer reads; None: there is none.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor
    reach: Reach | None = None


def cut(data: Positions, starts: Tensor, heads: int, device: torch.device, context: bool = False) -> Batch:
    """The segments that start at the answer tokens `starts` (S,), each with room for SEGMENT of them, for so many
    heads. context: whether there is a context layer."""
    ahead = starts[:, None] + torch.arange(SEGMENT + heads)
    ahead = data.answers[ahead.clamp(max=len(data.answers) - 1)]
    rows = ahead[:, :SEGMENT]
    hidden, tokens, left = (part.to(device) for part in (data.hidden[ahead], data.tokens[ahead], data.left[rows]))
    return Batch(hidden, tokens, left, reach_of(data, rows, device) if context else None)
