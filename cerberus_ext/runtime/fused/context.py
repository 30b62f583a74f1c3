"""A context layer as a program: a ContextForward, see drafting/context_layer.py, which has the formulas.

Its last stages answer the queries. Where nobody asks, the program ends with the stage that writes keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ...ops.step import NativeStep
from .lower import lower
from .program import Product, Program, Rows, Space, Stage, encode
from .step import table_positions
from .trace import NotFused, Trace, Tracing

if TYPE_CHECKING:
    from ...drafting.context_layer import BoundContext
    from ...target.cache import TreeCache


class FusedContext:
    """One context layer's; it reads the layer's weights where they lie."""

    def __init__(self, context: BoundContext, cache: TreeCache) -> None:
        """cache: after the prompt. Raises NotFused."""
        assert cache.tensor is not None
        if len(cache.length) != 1 or any(tensor.dtype != cache.tensor.dtype for tensor in context.tensors.values()):
            raise NotFused("there is one for one text, with heads of the model's dtype")
        self._trace = _trace(context, cache)
        self._make(cache)

    def _make(self, cache: TreeCache) -> None:
        assert cache.tensor is not None
        _, _, heads, _, size = cache.tensor.shape
        self._positions = table_positions(cache)
        program = lower(self._trace, cache.tensor.dtype, heads, size, False, self._positions)
        last = max(index for index, stage in enumerate(program.stages) if _writes(stage))
        self._width = program.logits.width
        self._keep = _native(replace(program, stages=program.stages[: last + 1]))
        self._read = _native(program)

    def keep(self, cache: TreeCache, positions: Tensor, before: Tensor, tokens: Tensor, ancestors: Tensor) -> None:
        self._run(self._keep, cache, cache.length, positions, before, tokens, ancestors)

    def read(
        self, cache: TreeCache, begin: Tensor, positions: Tensor, before: Tensor, tokens: Tensor, ancestors: Tensor
    ) -> Tensor:
        return self._run(self._read, cache, begin, positions, before, tokens, ancestors)

    def _run(
        self, native: NativeStep, cache: TreeCache, begin: Tensor, positions: Tensor, before: Tensor, tokens: Tensor,
        ancestors: Tensor,
    ) -> Tensor:  # fmt: skip
        assert cache.tensor is not None
        if cache.capacity > self._positions:
            self._make(cache)
        rows = before.new_empty(before.shape[1], self._width)
        native.run(tokens[0], positions[0], begin, ancestors, cache.tensor[-2:], before[0], rows)
        return rows[None]


def _trace(context: BoundContext, cache: TreeCache) -> Trace:
    tracing = Tracing(context.tensors.items(), cache, 1)
    before = tracing.input(*tracing.tokens.shape, context.output.shape[0], dtype=context.output.dtype)
    keys, values = tracing.planes
    with tracing.recording():
        rows = context.like(tracing.fakes).compute(
            (keys, values), tracing.length, tracing.positions, before, tracing.tokens, tracing.ancestors
        )
    return tracing.trace(before, rows, given=True)


def _writes(stage: Stage) -> bool:
    spaces = [instruction.to.base for instruction in stage.instructions] if isinstance(stage, Rows) else []
    return any(base is not None and base.space is Space.KEYS for base in spaces)


def _native(program: Program) -> NativeStep:
    products = [stage for stage in program.stages if isinstance(stage, Product)]
    return NativeStep(*encode(program, [product.weights[0] for product in products], [None] * len(products)))
