"""What one step reads: segments of the window that is in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import SEGMENT
from .positions import Positions


@dataclass
class Batch:
    """Segments of consecutive positions, all on the device.

    hidden (S, SEGMENT + K, D) bfloat16: also of the K positions after, where the teachers of the last ones are;
    tokens, left (S, SEGMENT) int64, see `Positions`. Rows beyond the end of the data, or of another answer, are there
    but are left out by `left`.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor


def cut(data: Positions, starts: Tensor, heads: int, device: torch.device) -> Batch:
    """The segments that start at the rows `starts` (S,), each with room for SEGMENT rows, for so many heads."""
    rows = starts[:, None] + torch.arange(SEGMENT)
    ahead = starts[:, None] + torch.arange(SEGMENT + heads)
    hidden = data.hidden[ahead.clamp(max=len(data.hidden) - 1)]
    return Batch(*(tensor.to(device) for tensor in (hidden, data.tokens[rows], data.left[rows])))
