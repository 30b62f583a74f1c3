"""A context layer as a program: a ContextForward, see drafting/context_layer.py, which has the formulas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...ops.step import NativeStep
from ...target.model import chain_ancestors
from .lower import lower
from .program import Product, encode
from .step import table_positions
from .trace import NotFused, Trace, Tracing, uninterrupted

_MOST_ROWS = 64  # of a run: so many have ancestors of one word

if TYPE_CHECKING:
    from ...drafting.context_layer import BoundContext
    from ...target.cache import TreeCache


class FusedContext:
    """One context layer's, for one text at a time, with its weights in eight bits.

    Pairs of tokens that are kept wait until the heads ask again: all of them then take one run, and none is made for a
    node that was not accepted.
    """

    def __init__(self, context: BoundContext, cache: TreeCache) -> None:
        """cache: after the prompt. Raises NotFused."""
        assert cache.tensor is not None
        if len(cache.length) != 1 or any(tensor.dtype != cache.tensor.dtype for tensor in context.tensors.values()):
            raise NotFused("there is one for one text, in the cache's dtype")
        self._trace = _trace(context, cache)
        assert context.packed is not None  # on a CPU
        self._packed = {context.tensors[name].data_ptr(): context.packed[name] for name in ("qkv", "output", "mixer")}
        self._make(cache)
        self.known = 0
        self.begin()

    def begin(self) -> None:
        """Another text, whose prompt's pairs are in the cache."""
        self._states: list[Tensor] = []  # (A, D) each: those that led to
        self._tokens: list[Tensor] = []  # (A,) each, behind which the pending token comes
        self._knows_pending = False  # whether its pair is in the cache already

    def keep_pending(self, before: Tensor, pending: Tensor) -> None:
        if not self._knows_pending:
            self._states.append(before.clone())
            self._tokens.append(pending.clone())

    def keep_path(self, hidden: Tensor, tokens: Tensor, path: Tensor) -> None:
        self._knows_pending = False
        accepted = sum(node >= 0 for node in path.tolist())  # in less time than by torch's ops
        if accepted > 1:
            self._states.append(hidden.index_select(0, path[: accepted - 1]))
            self._tokens.append(tokens.index_select(0, path[1:accepted]))

    def read(self, cache: TreeCache, before: Tensor, pending: Tensor) -> Tensor:
        assert cache.tensor is not None
        if cache.capacity > self._positions:
            self._make(cache)
        states, tokens = torch.cat([*self._states, before]), torch.cat([*self._tokens, pending])
        self.begin()
        self._knows_pending = True
        rows, planes = torch.empty_like(states), cache.tensor[-2:]
        for begin in range(0, len(tokens), _MOST_ROWS):
            part = slice(begin, begin + _MOST_ROWS)
            first, nodes = cache.length + (begin + 1 - len(tokens)), len(tokens[part])
            positions, ancestors = first + torch.arange(nodes), chain_ancestors(nodes)
            self._native.run(tokens[part], positions, [first], [ancestors], [planes], states[part], rows[part])
        self.known = cache.committed + 1
        return rows[-1:]

    def _make(self, cache: TreeCache) -> None:
        assert cache.tensor is not None
        _, _, heads, _, size = cache.tensor.shape
        self._positions = table_positions(cache)
        program = lower(self._trace, cache.tensor.dtype, heads, size, False, self._positions)
        products = [stage for stage in program.stages if isinstance(stage, Product)]
        weights = [self._packed[product.weights[0].data_ptr()] for product in products]
        self._native = NativeStep(*encode(program, weights, [None] * len(weights)))


@uninterrupted()
def _trace(context: BoundContext, cache: TreeCache) -> Trace:
    tracing = Tracing(context.tensors.items(), cache, 1)
    before = tracing.input(*tracing.tokens.shape, len(context.bias), dtype=context.bias.dtype)
    keys, values = tracing.planes
    with tracing.recording():
        rows = context.like(tracing.fakes).compute(
            (keys, values), tracing.length, tracing.positions, before, tracing.tokens, tracing.ancestors
        )
    return tracing.trace(before, rows, given=True)
