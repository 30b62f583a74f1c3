"""A context layer as a program: on a CPU a ContextForward, see drafting/context_layer.py, which has the formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...drafting.context_layer import ContextForward
from ...ops.step import NativeStep
from ...target.row_invariant import ELEMENTWISE, PRODUCTS, RowInvariant
from ...target.step_row import chain_ancestors
from .lower import lower
from .program import Product, encode
from .step import joined, table_positions
from .trace import NotFused, Trace, Tracing, uninterrupted

_MOST_ROWS = 64  # of a run: so many have ancestors of one word
_STAND_INS = PRODUCTS | {F.silu: ELEMENTWISE[F.silu]}  # for torch's ops that the layer calls where it is not on a CPU

if TYPE_CHECKING:
    from ...drafting.context_layer import BoundContext
    from ...target.attention import Topology
    from ...target.cache import TreeCache


class ContextProgram:
    """One context layer's, with its weights in eight bits."""

    def __init__(self, context: BoundContext, cache: TreeCache) -> None:
        """cache: after the prompt. Raises NotFused."""
        self._trace = trace_context(context, cache)
        assert context.packed is not None  # on a CPU
        self._packed = {context.tensors[name].data_ptr(): context.packed[name] for name in ("qkv", "output", "mixer")}
        self._make(cache, table_positions(cache, 1))

    def run(self, texts: Sequence[Pairs]) -> list[Tensor]:
        """Puts the pairs into their caches -> what each text's last one is read as, (1, D)."""
        needed = max(table_positions(text.cache, 1) for text in texts)
        if needed > self._positions:
            self._make(texts[0].cache, needed)
        last: list[Tensor] = [text.states[-1:] for text in texts]
        begin, left = 0, list(range(len(texts)))
        while left:
            parts = [texts[number].part(begin) for number in left]
            for number, found in zip(left, self._run(parts), strict=True):
                last[number] = found[-1:]
            begin += _MOST_ROWS
            left = [number for number in left if len(texts[number].tokens) > begin]
        return last

    def _run(self, parts: Sequence[Pairs]) -> Sequence[Tensor]:
        """At most _MOST_ROWS of each text -> what all are read as. Few calls of torch: each finds its code cold."""
        sizes = [len(part.tokens) for part in parts]
        firsts = [part.cache.length + (1 - part.left) if part.left > 1 else part.cache.length for part in parts]
        positions = [
            first + torch.arange(size) if size > 1 else first for first, size in zip(firsts, sizes, strict=True)
        ]
        states = joined([part.states for part in parts])
        planes = [part.cache.tensor[-2:] for part in parts if part.cache.tensor is not None]
        rows = torch.empty_like(states)
        self._native.run(
            joined([part.tokens for part in parts]), joined(positions), firsts,
            [chain_ancestors(size) for size in sizes], planes, states, rows,
        )  # fmt: skip
        return rows.split(sizes) if len(sizes) > 1 else [rows]

    def _make(self, cache: TreeCache, positions: int) -> None:
        assert cache.tensor is not None
        _, _, heads, _, size = cache.tensor.shape
        self._positions = positions
        program = lower(self._trace, cache.tensor.dtype, heads, size, None, positions)
        products = [stage for stage in program.stages if isinstance(stage, Product)]
        weights = [self._packed[product.weights[0].data_ptr()] for product in products]
        self._native = NativeStep(*encode(program, weights, [None] * len(weights)))


class Pairs(NamedTuple):
    """Of one text: states (A, D) led to tokens (A,). left: so many, from the first on, the pending token's the last."""

    cache: TreeCache
    states: Tensor
    tokens: Tensor
    left: int

    def part(self, begin: int) -> Pairs:
        """Those of one run."""
        if self.left <= _MOST_ROWS:
            return self
        here = slice(begin, begin + _MOST_ROWS)
        return Pairs(self.cache, self.states[here], self.tokens[here], self.left - begin)


class FusedContext(ContextForward):
    """The context layer of one text.

    Pairs of tokens that are kept wait until the heads ask again: all of them then take one run, and none is made for a
    node that was not accepted.
    """

    def __init__(self, program: ContextProgram) -> None:
        self._known = 0  # of so many tokens the pairs are in the cache
        self._program = program
        self._begin()

    def keep_prompt(self, cache: TreeCache) -> None:
        self._known = cache.committed

    def _begin(self) -> None:
        """All pairs that are kept are in the cache."""
        self._states: list[Tensor] = []  # (A, D) each: those that led to
        self._tokens: list[Tensor] = []  # (A,) each, behind which the pending token comes
        self._knows_pending = False  # whether its pair is in the cache already

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        """The pending token is about to be verified: it stays. Of the others `keep_path` tells."""
        if not self._knows_pending:
            self._states.append(before.clone())
            self._tokens.append(tokens[0, :1].clone())

    def keep_path(self, hidden: Tensor, tokens: Tensor, path: Tensor) -> None:
        self._knows_pending = False
        accepted = sum(node >= 0 for node in path.tolist())  # in less time than by torch's ops
        if accepted > 1:
            self._states.append(hidden.index_select(0, path[: accepted - 1]))
            self._tokens.append(tokens.index_select(0, path[1:accepted]))

    def kept(self, cache: TreeCache) -> int:
        return min(self._known, cache.committed)

    def read(self, cache: TreeCache, before: Tensor, pending: Tensor) -> Tensor:
        return self.read_together([(self, cache, before, pending)])

    def read_together(self, texts: Sequence[tuple[FusedContext, TreeCache, Tensor, Tensor]]) -> Tensor:
        return joined(self._program.run([text._take(cache, before, pending) for text, cache, before, pending in texts]))

    def _take(self, cache: TreeCache, before: Tensor, pending: Tensor) -> Pairs:
        """The pairs that wait, and the pending token's."""
        tokens = joined([*self._tokens, pending])
        pairs = Pairs(cache, joined([*self._states, before]), tokens, len(tokens))
        self._begin()
        self._knows_pending, self._known = True, cache.committed + 1
        return pairs


@uninterrupted()
def trace_context(context: BoundContext, cache: TreeCache, keeps: bool = False) -> Trace:
    """Of the layer; keeps: of its beginning alone, which puts pairs into the cache, and makes their anchors.

    cache: in use. Raises NotFused.
    """
    assert cache.tensor is not None
    if len(cache.length) != 1 or any(tensor.dtype != cache.tensor.dtype for tensor in context.tensors.values()):
        raise NotFused("there is one for texts of their own, in the cache's dtype")
    tracing = Tracing(context.tensors.items(), cache, 1)
    before = tracing.input(*tracing.tokens.shape, len(context.bias), dtype=context.bias.dtype)
    keys, values = tracing.planes
    pairs = (keys, values), tracing.length, tracing.positions, before, tracing.tokens
    with tracing.recording(), RowInvariant(_STAND_INS):
        layer = context.like(tracing.fakes)
        rows = layer.keep_pairs("key_value", *pairs)[1] if keeps else layer.compute(*pairs, tracing.ancestors)
    return tracing.trace(before, rows, given=True)
