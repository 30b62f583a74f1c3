"""From a traced step to a program: every call becomes a view, instructions on rows, a part of a product, an attention.

Stages are made in turn: all instructions whose operands are there, then a product, with all others of the same input,
or an attention. What cannot be said so raises NotFused.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .place import place
from .program import Attention, Base, Instruction, Product, Program, RowOp, Rows, Space, View, dense_strides, size_of
from .rules import EMITTERS
from .trace import NODES, Call, NotFused, Ref, Trace, node_axis, refs
from .values import Kind, Values
from .views import ARRANGING, RESHAPING, broadcast, reshaped

if TYPE_CHECKING:
    from collections.abc import Sequence

_OURS = torch.ops.cerberus_ext
_LINEAR, _WRITE, _ATTEND = _OURS.linear.default, _OURS.write_cache.default, _OURS.tree_attention.default
_EMBEDDING = torch.ops.aten.embedding.default


@dataclass
class Lowering:
    """views: of the row values so far, by number. rows: the instructions of the stage that is being made."""

    trace: Trace
    dtype: torch.dtype
    values: Values
    constants: list[Tensor] = field(default_factory=list)
    stages: list[Any] = field(default_factory=list)
    views: dict[int, View] = field(default_factory=dict)
    rows: Rows = field(default_factory=Rows)
    tables: dict[int, Base] = field(default_factory=dict)  # of positional values
    _constants: dict[int, Base] = field(default_factory=dict)
    _by_data: dict[tuple[int, int], int] = field(default_factory=dict)

    # --- operands ---

    def operand(self, argument: Any, shape: Sequence[int]) -> View:
        """An argument of a call, as it stands beside a value of that shape."""
        if not isinstance(argument, Ref):
            if not isinstance(argument, (int, float)):
                raise NotFused(f"the model computes with {argument!r}")
            return View(None, tuple(shape), (0,) * len(shape), 0, float(argument))
        return broadcast(self.view(argument.number), shape)

    def view(self, number: int) -> View:
        """A value that is there."""
        if number in self.views:
            return self.views[number]
        kind, shape = self.values.kinds[number], self.trace.shapes[number]
        if kind is Kind.CONSTANT:
            return self._constant_view(number)
        if kind is not Kind.POSITIONAL:
            raise NotFused("the model computes with its tokens, or with its cache, in another way than is known")
        self._check_dtype(self.trace.dtypes[number])
        if number not in self.tables:  # its place among the constants is known once all tables are
            self.tables[number] = Base(size_of(shape), self.trace.dtypes[number], Space.POSITION, fixed=True)
        return View(self.tables[number], tuple(shape), dense_strides(shape))

    def _constant_view(self, number: int) -> View:
        value, shape = self.values.constant(number), tuple(self.trace.shapes[number])
        if NODES in shape:
            axis = node_axis(shape)
            first = value.narrow(axis, 0, 1)
            if not value.equal(first.expand_as(value)):
                raise NotFused(f"the model computes with numbers that differ between the tokens of a step, {shape}")
            value = first
        if value.dim() == 0 and (value.is_floating_point() or value.dtype in (torch.int64, torch.int32)):
            return View(None, (), (), 0, float(value))
        self._check_dtype(value.dtype)
        if number not in self._constants:
            self._constants[number] = Base(size_of(shape), value.dtype, Space.CONSTANT, self.keep(value), fixed=True)
        return View(self._constants[number], shape, dense_strides(shape))

    def keep(self, tensor: Tensor) -> int:
        """Among the constants of the program; the same memory once."""
        tensor = tensor.contiguous()
        key = (tensor.data_ptr(), tensor.numel())
        if key not in self._by_data:
            self._by_data[key] = len(self.constants)
            self.constants.append(tensor)
        return self._by_data[key]

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, self.dtype):
            raise NotFused(f"the model computes in {dtype} in the course of a step")

    # --- results ---

    def new(self, number: int) -> View:
        """Memory for a value."""
        shape, dtype = tuple(self.trace.shapes[number]), self.trace.dtypes[number]
        node_axis(shape)
        self._check_dtype(dtype)
        return View(Base(size_of(shape), dtype), shape, dense_strides(shape))

    def scratch(self, shape: Sequence[int]) -> View:
        """Memory for something in between, in float32."""
        return View(Base(size_of(shape), torch.float32), tuple(shape), dense_strides(shape))

    def emit(self, op: RowOp, to: View, a: View, b: View | None = None) -> View:
        assert to.base is not None
        rounds = self.dtype != torch.float32 and to.base.dtype == self.dtype
        self.rows.instructions.append(Instruction(op, rounds, to, a, b))
        return to

    def whole(self, view: View) -> Base:
        """The value in memory of its own, in order; copied where it is not so already."""
        if view.base is not None and view.base.space is Space.SCRATCH and view.is_whole():
            return view.base
        dtype = torch.float32 if view.base is None else view.base.dtype
        to = View(Base(size_of(view.shape), dtype), view.shape, dense_strides(view.shape))
        base = self.emit(RowOp.COPY, to, view).base
        assert base is not None
        return base

    # --- calls ---

    def run(self, call: Call) -> None:
        """A call that needs no stage of its own."""
        if call.op is _WRITE:
            return self._write(call)
        if call.op is _EMBEDDING:
            return self._embed(call)
        if call.op in RESHAPING or call.op in ARRANGING:
            return self._arrange(call)
        if call.op not in EMITTERS:
            raise NotFused(f"{call.op} is not known")
        self.views[call.outputs[0]] = EMITTERS[call.op](self, call)

    def _arrange(self, call: Call) -> None:
        view = self.view(call.args[0].number)
        shapes = [tuple(self.trace.shapes[number]) for number in call.outputs]
        for shape in shapes:
            node_axis(shape, call.op)
        if call.op in RESHAPING:
            found = reshaped(view, shapes[0])
            if found is None:
                found = reshaped(View(self.whole(view), view.shape, dense_strides(view.shape)), shapes[0])
            assert found is not None
            results = [found]
        else:
            made = ARRANGING[call.op](view, *call.args[1:])
            results = made if isinstance(made, list) else [made]
        for number, shape, result in zip(call.outputs, shapes, results, strict=True):
            if result.shape != shape:
                raise NotFused(f"{call.op} makes {shape} of {view.shape}")
            self.views[number] = result

    def _embed(self, call: Call) -> None:
        weight, tokens = (argument.number for argument in call.args[:2])
        if self.values.kinds[tokens] is not Kind.TOKENS or self.values.kinds[weight] is not Kind.CONSTANT:
            raise NotFused("the model looks up something else than its tokens")
        table = self.values.constant(weight)
        shape = tuple(self.trace.shapes[call.outputs[0]])
        base = Base(table.shape[1], table.dtype, Space.TOKEN, self.keep(table), fixed=True)
        self.views[call.outputs[0]] = View(base, shape, dense_strides(shape))

    def _write(self, call: Call) -> None:
        for plane, states, space in zip(call.args[:2], call.args[2:4], (Space.KEYS, Space.VALUES), strict=True):
            index = self.trace.planes.index(plane.number)
            view = self.view(states.number)  # (1, N, Hkv, E)
            to = Base(size_of(view.shape), self.dtype, space, index // 2, fixed=True)
            self.emit(RowOp.COPY, View(to, view.shape, dense_strides(view.shape)), view)

    def close_rows(self) -> None:
        if self.rows.instructions:
            self.stages.append(self.rows)
            self.rows = Rows()

    def product(self, calls: list[Call]) -> None:
        """Products of one input as one stage."""
        view = self.view(calls[0].args[0].number)
        source = self.whole(view)
        self.close_rows()
        weights, biases = [], []
        for call in calls:
            weight = self.values.constant(call.args[1].number)
            transposed = len(call.args) > 3 and call.args[3]
            weights.append(weight.t().contiguous() if transposed else weight)
            biases.append(None if call.args[2] is None else self.values.constant(call.args[2].number))
        output = Base(sum(len(weight) for weight in weights), self.dtype)
        names = [str(call.args[1].number) for call in calls]
        self.stages.append(Product(source, output, weights, biases, names))
        begin = 0
        for call, weight in zip(calls, weights, strict=True):
            shape = tuple(self.trace.shapes[call.outputs[0]])
            self.views[call.outputs[0]] = View(output, shape, dense_strides(shape), begin)
            begin += len(weight)

    def attention(self, call: Call) -> None:
        query, keys, values, length, ancestors, scale, window = call.args[:7]
        softcap = call.args[7] if len(call.args) > 7 else call.kwargs.get("softcap", 0.0)
        sinks = call.args[8] if len(call.args) > 8 else call.kwargs.get("sinks")
        planes = self.trace.planes
        layer = planes.index(keys.number) // 2
        known = (length.number, ancestors.number) == (self.trace.length, self.trace.ancestors)
        if not known or values.number != planes[2 * layer + 1] or keys.number != planes[2 * layer]:
            raise NotFused("the model attends to something else than a layer of its cache")
        view = self.view(query.number)  # (1, N, Hq, E)
        source = self.whole(view)
        self.close_rows()
        output = Base(source.width, self.dtype)
        place_of_sinks = -1 if sinks is None else self.keep(self.values.constant(sinks.number))
        stage = Attention(layer, source, output, view.shape[2], scale, window, softcap, place_of_sinks)
        self.stages.append(stage)
        shape = tuple(self.trace.shapes[call.outputs[0]])
        self.views[call.outputs[0]] = View(output, shape, dense_strides(shape))


def lower(trace: Trace, dtype: torch.dtype, heads: int, head_size: int, positions: int) -> Program:
    """heads, head_size: of keys and values. positions: that the tables are to know. Raises NotFused."""
    values = Values(trace)
    lowering = Lowering(trace, dtype, values)
    order = _Order(trace.calls, values)
    while order.rows or order.stages:
        while order.rows:
            call = order.take(order.rows)
            lowering.run(call)
            order.done(call)
        if order.stages:
            _run_stage(lowering, order)
    if order.missing:
        raise NotFused(f"{trace.calls[min(order.missing)].op} waits for something that is never computed")
    hidden, logits = (lowering.whole(lowering.view(number)) for number in (trace.hidden, trace.logits))
    lowering.close_rows()
    _place_tables(lowering, positions)
    buffers = place(lowering.stages, dtype, (hidden, logits))
    layers = len(trace.planes) // 2
    return Program(
        dtype, layers, heads, head_size, lowering.constants, lowering.stages, hidden, logits, buffers, positions
    )


class _Order:
    """Which calls can run: rows, those that need no stage of their own; stages, the others; missing, by call how many
    of its operands are not there."""

    def __init__(self, calls: list[Call], values: Values) -> None:
        self.calls = calls
        self.rows: list[int] = []
        self.stages: list[int] = []
        self.missing: dict[int, int] = {}
        self._waiting: dict[int, list[int]] = {}  # by value
        for index, call in enumerate(calls):
            if call.op is not _WRITE and not any(values.kinds[number] is Kind.ROW for number in call.outputs):
                continue
            needed = {number for number in refs(call) if values.kinds[number] is Kind.ROW}
            if call.op is _ATTEND:
                needed |= {call.args[1].number, call.args[2].number}  # planes, once they are written to
            for number in needed:
                self._waiting.setdefault(number, []).append(index)
            self.missing[index] = len(needed)
            self._sort(index)

    def _sort(self, index: int) -> None:
        if self.missing[index] == 0:
            del self.missing[index]
            heapq.heappush(self.stages if self.calls[index].op in (_LINEAR, _ATTEND) else self.rows, index)

    def take(self, ready: list[int]) -> Call:
        """The first one of those that are ready."""
        return self.calls[heapq.heappop(ready)]

    def done(self, call: Call) -> None:
        made = [argument.number for argument in call.args[:2]] if call.op is _WRITE else call.outputs
        for number in made:
            for index in self._waiting.pop(number, ()):
                self.missing[index] -= 1
                self._sort(index)


def _run_stage(lowering: Lowering, order: _Order) -> None:
    first = order.take(order.stages)
    calls = [first]
    if first.op is _ATTEND:
        lowering.attention(first)
    else:
        view = lowering.view(first.args[0].number)
        for index in sorted(order.stages):
            call = order.calls[index]
            if call.op is _LINEAR and _same(lowering.view(call.args[0].number), view):
                calls.append(call)
                order.stages.remove(index)
        heapq.heapify(order.stages)
        lowering.product(calls)
    for call in calls:
        order.done(call)


def _same(a: View, b: View) -> bool:
    """Whether two inputs of products are one."""
    return a.base is b.base and a.offset == b.offset and (a == b or (a.is_whole() and b.is_whole()))


def _place_tables(lowering: Lowering, positions: int) -> None:
    tables = lowering.values.tables(lowering.tables, positions)
    for number, base in lowering.tables.items():
        base.place = lowering.keep(tables[number].reshape(positions, -1))
