"""What the heads draft in a step over static tensors, and what the host gets of it.

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


class StaticDrafts:
    """The heads' drafts for one step: ids, logprobs (B, K, P) int64, float32.

    bits (B, 3 K P) int32: both, one behind the other.
    """

    def __init__(self, batch: int, heads: int, drafts: int, device: torch.device) -> None:
        count, shape = heads * drafts, (heads, drafts)
        memory = torch.zeros((batch, count + -(-count // 2)), dtype=torch.int64, device=device)
        self.ids = memory[:, :count].unflatten(1, shape)
        self.logprobs = memory[:, count:].view(torch.float32)[:, :count].unflatten(1, shape)
        self.bits = memory.view(torch.int32)[:, : 3 * count]

    def put(self, ids: Tensor, logprobs: Tensor) -> None:
        """ids, logprobs (B, K, P): one copy of both."""
        parts = [part.flatten(1).view(torch.int32) for part in (ids.long(), logprobs.float())]
        torch.cat(parts, 1, out=self.bits)


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
        floats = self._drafted + pairs + 1  # two in the place of an int64
        columns = 2 * nodes + self._drafted + -(-floats // 2)
        self._conditional = conditional and shape is not None
        self.buffer = torch.zeros((batch, columns), dtype=torch.int64, device=device)
        self.host = torch.zeros((batch, columns), dtype=torch.int64, pin_memory=device.type == "cuda")
        self.target, self.path, self.entropy, self.ids, self.logprobs, self.after = self._parts(self.buffer)
        self._on_host = self._parts(self.host)
        self.path[:, 1:] = -1
        self._bits = self.buffer[:, 2 * nodes :].view(torch.int32)[:, : 2 * self._drafted + floats]

    def put(self, entropy: Tensor, drafts: StaticDrafts | None = None, after: Tensor | None = None) -> None:
        """entropy (B,), drafts and after as they are in this result: one copy of all."""
        if drafts is None:
            self.entropy.copy_(entropy)
            return
        parts = [drafts.bits, *([] if after is None else [after.flatten(1).view(torch.int32)])]
        torch.cat([*parts, entropy[:, None].view(torch.int32)], 1, out=self._bits)

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
        weighed = math.prod(pairs) if self._conditional else 0
        logprobs, last, entropy = floats[:, : count + weighed + 1].split([count, weighed, 1], 1)
        after = last.unflatten(1, pairs) if self._conditional else None
        return target, path, entropy[:, 0], ids.unflatten(1, each), logprobs.unflatten(1, each), after
