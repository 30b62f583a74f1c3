"""What the host gets of a step over static tensors.

Letters: B rows (1 so far), N nodes, K heads, P drafts per head.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Read(NamedTuple):
    """What the host has read of a step, of row 0."""

    target: list[int]  # what the target model chose after each node
    path: list[int]  # the accepted nodes, node 0 included
    entropy: float | None  # None: it was not asked for
    # For the next step: ids, logprobs (K, P), and these after each token before, (K - 1, P, P), or None.
    drafts: tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None] | None


class StaticResult:
    """What the host gets of a step: one buffer, and its twin on the host.

    target (B, N), path (B, N) int64: the accepted nodes, then -1.
    entropy (B,) float32: of softmax(hidden), for the next step's gate.
    ids, logprobs (B, K, P) int64, float32: the drafts for the next step; None where they are not drafted yet.
    after (B, K - 1, P, P) float32: these after each token before, see `ops.rerank`; None: nobody wants to know.
    """

    def __init__(
        self, batch: int, nodes: int, shape: tuple[int, int] | None, conditional: bool, device: torch.device
    ) -> None:
        """shape: (K, P) of the drafts; None: there are none. conditional: whether there is `after`."""
        self._nodes, (heads, drafts) = nodes, shape or (0, 0)
        pairs = (heads - 1) * drafts * drafts if conditional else 0
        self._shapes = (heads, drafts), (heads - 1, drafts, drafts)
        self._drafted = heads * drafts
        floats = 1 + self._drafted + pairs  # two in the place of an int64
        columns = 2 * nodes + self._drafted + -(-floats // 2)
        self._conditional = conditional and shape is not None
        self.buffer = torch.zeros((batch, columns), dtype=torch.int64, device=device)
        self.host = torch.zeros((batch, columns), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.target, self.path, self.entropy, self.ids, self.logprobs, self.after = self._parts(self.buffer)
        self._on_host = self._parts(self.host)
        self.path[:, 1:] = -1

    def read(self) -> Read:
        """After the buffer was copied to `host`."""
        target, path, entropy, ids, logprobs, after = self._on_host
        drafts = None
        if ids is not None and logprobs is not None:
            copied = None if after is None else after[0].numpy().copy()
            drafts = ids[0].numpy().copy(), logprobs[0].numpy().copy(), copied
        accepted = [node for node in path[0].tolist() if node >= 0]
        return Read(target[0].tolist(), accepted, entropy[0].item(), drafts)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        target, path, rest = buffer.tensor_split([self._nodes, 2 * self._nodes], 1)
        count = self._drafted
        ids, floats = rest[:, :count], rest[:, count:].view(torch.float32)
        if not count:
            return target, path, floats[:, 0], None, None, None
        each, pairs = self._shapes
        logprobs, last = floats[:, 1 : 1 + count].unflatten(1, each), floats[:, 1 + count :]
        after = last[:, : math.prod(pairs)].unflatten(1, pairs) if self._conditional else None
        return target, path, floats[:, 0], ids.unflatten(1, each), logprobs, after
