"""What one step reads: segments of the window that is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .context import Reach, reach_of
from .options import SEGMENT
from .positions import Positions


@dataclass
class Batch:
    """Segments of consecutive answer tokens, all on the device.

    hidden (S, SEGMENT + K, D) bfloat16: also of the K positions after, where the teachers of the last ones are;
    tokens, left (S, SEGMENT) int64, see `Positions`. Rows beyond the end of the data, or of another answer, are there
    but are left out by `left`. reach: what a context layer reads; None: there is none.
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
    hidden, tokens, left = (part.to(device) for part in (data.hidden[ahead], data.tokens[rows], data.left[rows]))
    return Batch(hidden, tokens, left, reach_of(data, rows, device) if context else None)
