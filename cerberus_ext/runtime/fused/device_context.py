"""A context layer on a device whose steps may be captured: a ContextForward, see drafting/context_layer.py.

What is captured has one number of rows, so pairs cannot wait until the heads ask, as on a CPU: those of all nodes are
put into the cache with the nodes, by a program of the layer's beginning alone, and those of the accepted path are moved
with its keys and values. The whole layer runs for the pending token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...drafting.context_layer import ContextForward
from ...drafting.tree import ALONE
from .context import trace_context
from .lower import lower
from .program import Product, encode
from .step import NATIVE, table_positions
from .trace import Trace

if TYPE_CHECKING:
    from ...drafting.context_layer import BoundContext
    from ...target.attention import Topology
    from ...target.cache import TreeCache


class DeviceContext(ContextForward):
    """One context layer's, with its own weights, which it reads where they lie; of one text at a time."""

    def __init__(self, context: BoundContext, cache: TreeCache) -> None:
        """cache: after the prompt. Raises NotFused."""
        self._keeps = _Part(trace_context(context, cache, keeps=True), cache)
        self._reads = _Part(trace_context(context, cache), cache)
        self._alone = ALONE.on(cache.length.device)
        self._led: dict[int, Tensor] = {}  # (N, D), by N: what led to the nodes' tokens

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        nodes, led, positions = len(tree.parents), before, cache.length
        if nodes > 1:
            if nodes not in self._led:
                self._led[nodes] = torch.empty_like(hidden[0])
            parents = hidden[0].index_select(0, tree.parents[1:])
            led = torch.cat([before, parents], out=self._led[nodes])
            positions = cache.length + tree.depths
        self._keeps.run(cache, led, tokens[0], positions, tree.ancestors)

    def read(self, cache: TreeCache, before: Tensor, pending: Tensor) -> Tensor:
        """Another read writes over it."""
        return self._reads.run(cache, before, pending, cache.length, self._alone.ancestors)


class _Part:
    """The layer, or its beginning, as a program for any number of nodes."""

    def __init__(self, trace: Trace, cache: TreeCache) -> None:
        self._trace = trace
        self._results: dict[int, Tensor] = {}  # (N, D), by N
        self._make(cache, table_positions(cache, cache.capacity))

    def _make(self, cache: TreeCache, positions: int) -> None:
        assert cache.tensor is not None
        _, _, heads, _, size = cache.tensor.shape
        self._positions = positions
        program = lower(self._trace, cache.tensor.dtype, heads, size, None, positions)
        weights = [stage.weights[0] for stage in program.stages if isinstance(stage, Product)]
        self._native = NATIVE[cache.tensor.device.type](*encode(program, weights, [None] * len(weights)))

    def run(self, cache: TreeCache, states: Tensor, tokens: Tensor, positions: Tensor, ancestors: Tensor) -> Tensor:
        """states (N, D), tokens, positions (N,), ancestors (N, W) -> (N, D). Where states lie is planned for, see
        DeviceStep.run: they are to stay there."""
        assert cache.tensor is not None
        needed = table_positions(cache, cache.capacity)
        if needed > self._positions:
            self._make(cache, needed)
        nodes = len(tokens)
        if nodes not in self._results:
            self._results[nodes] = torch.empty_like(states)
        result = self._results[nodes]
        self._native.run(tokens, positions, [cache.length], [ancestors], [cache.tensor[-2:]], states, result)
        return result
