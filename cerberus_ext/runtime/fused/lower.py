"""From a traced step to a program: every call becomes a view, instructions on rows, a part of a product, an attention.

Stages are made in turn: all instructions whose operands are there, then a product, with all others of the same input, a
grouped product, or an attention. What cannot be said so raises NotFused.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

import torch

from .lowering import Lowering
from .place import place
from .program import Attention, Base, Grouped, Product, Program, RowOp, Space, View, dense_strides, size_of
from .rules import EMITTERS
from .trace import Call, NotFused, Trace, node_axis, refs
from .values import Kind, Values
from .views import ARRANGING, RESHAPING, reshaped

_OURS = torch.ops.cerberus_ext
_LINEAR, _WRITE, _ATTEND = _OURS.linear.default, _OURS.write_cache.default, _OURS.tree_attention.default
_GROUPED = _OURS.grouped_linear.default
_STAGES = (_LINEAR, _ATTEND, _GROUPED)
_EMBEDDING = torch.ops.aten.embedding.default
Kinds = Mapping[int, torch.dtype | None]


def _run(lowering: Lowering, call: Call) -> None:
    """A call that needs no stage of its own."""
    if call.op is _WRITE:
        return _write(lowering, call)
    if call.op is _EMBEDDING:
        return _embed(lowering, call)
    if call.op in RESHAPING or call.op in ARRANGING:
        return _arrange(lowering, call)
    if call.op not in EMITTERS:
        raise NotFused(f"{call.op} is not known")
    made = EMITTERS[call.op](lowering, call)
    lowering.views |= zip(call.outputs, made if isinstance(made, tuple) else (made,), strict=False)


def _arrange(lowering: Lowering, call: Call) -> None:
    view = lowering.view(call.args[0].number)
    shapes = [tuple(lowering.trace.shapes[number]) for number in call.outputs]
    for shape in shapes:
        node_axis(shape, call.op)
    if call.op in RESHAPING:
        found = reshaped(view, shapes[0])
        if found is None:
            found = reshaped(View(lowering.whole(view), view.shape, dense_strides(view.shape)), shapes[0])
        assert found is not None
        results = [found]
    else:
        made = ARRANGING[call.op](view, *call.args[1:])
        results = made if isinstance(made, list) else [made]
    for number, shape, result in zip(call.outputs, shapes, results, strict=True):
        if result.shape != shape:
            raise NotFused(f"{call.op} makes {shape} of {view.shape}")
        lowering.views[number] = result


def _embed(lowering: Lowering, call: Call) -> None:
    weight, tokens = (argument.number for argument in call.args[:2])
    if lowering.values.kinds[tokens] is not Kind.TOKENS or lowering.values.kinds[weight] is not Kind.CONSTANT:
        raise NotFused("the model looks up something else than its tokens")
    table = lowering.values.constant(weight)
    shape = tuple(lowering.trace.shapes[call.outputs[0]])
    base = Base(table.shape[1], table.dtype, Space.TOKEN, lowering.keep(table), fixed=True)
    lowering.views[call.outputs[0]] = View(base, shape, dense_strides(shape))


def _write(lowering: Lowering, call: Call) -> None:
    for plane, states, space in zip(call.args[:2], call.args[2:4], (Space.KEYS, Space.VALUES), strict=True):
        index = lowering.trace.planes.index(plane.number)
        view = lowering.view(states.number)  # (1, N, Hkv, E)
        to = Base(size_of(view.shape), lowering.dtype, space, index // 2, fixed=True)
        lowering.emit(RowOp.COPY, View(to, view.shape, dense_strides(view.shape)), view)


def _check_product(lowering: Lowering, call: Call) -> None:
    dtype = lowering.trace.dtypes[call.outputs[0]]
    if dtype != lowering.dtype:
        raise NotFused(f"the model multiplies in {dtype} in the course of a step")


def _product(lowering: Lowering, calls: list[Call]) -> None:
    """Products of one input as one stage."""
    for call in calls:
        _check_product(lowering, call)
    view = lowering.view(calls[0].args[0].number)
    source = lowering.whole(view)
    lowering.close_rows()
    weights, biases = [], []
    for call in calls:
        weight = lowering.values.constant(call.args[1].number)
        transposed = len(call.args) > 3 and call.args[3]
        weights.append(weight.t().contiguous() if transposed else weight)
        biases.append(None if call.args[2] is None else lowering.values.constant(call.args[2].number))
    output = Base(sum(len(weight) for weight in weights), lowering.dtype)
    names = [lowering.trace.names.get(call.args[1].number, "a weight") for call in calls]
    lowering.stages.append(Product(source, output, weights, biases, names))
    begin = 0
    for call, weight in zip(calls, weights, strict=True):
        shape = tuple(lowering.trace.shapes[call.outputs[0]])
        lowering.views[call.outputs[0]] = View(output, shape, dense_strides(shape), begin)
        begin += len(weight)


def _grouped(lowering: Lowering, call: Call) -> None:
    _check_product(lowering, call)
    source, chosen = (lowering.whole(lowering.view(call.args[index].number)) for index in (0, 3))
    lowering.close_rows()
    weight, bias = call.args[1], call.args[2]
    shape = tuple(lowering.trace.shapes[call.outputs[0]])
    output = Base(size_of(shape), lowering.dtype)
    stage = Grouped(
        source, output, chosen, lowering.values.constant(weight.number),
        None if bias is None else lowering.values.constant(bias.number),
        len(call.args) > 4 and call.args[4], lowering.trace.names.get(weight.number, "a weight"),
    )  # fmt: skip
    lowering.stages.append(stage)
    lowering.views[call.outputs[0]] = View(output, shape, dense_strides(shape))


def _attention(lowering: Lowering, call: Call) -> None:
    query, keys, values, length, ancestors, scale, window = call.args[:7]
    softcap = call.args[7] if len(call.args) > 7 else call.kwargs.get("softcap", 0.0)
    sinks = call.args[8] if len(call.args) > 8 else call.kwargs.get("sinks")
    planes = lowering.trace.planes
    layer = planes.index(keys.number) // 2
    known = (length.number, ancestors.number) == (lowering.trace.length, lowering.trace.ancestors)
    if not known or values.number != planes[2 * layer + 1] or keys.number != planes[2 * layer]:
        raise NotFused("the model attends to something else than a layer of its cache")
    view = lowering.view(query.number)  # (1, N, Hq, E)
    source = lowering.whole(view)
    lowering.close_rows()
    output = Base(source.width, lowering.dtype)
    place_of_sinks = -1 if sinks is None else lowering.keep(lowering.values.constant(sinks.number))
    stage = Attention(layer, source, output, view.shape[2], scale, window, softcap, place_of_sinks)
    lowering.stages.append(stage)
    shape = tuple(lowering.trace.shapes[call.outputs[0]])
    lowering.views[call.outputs[0]] = View(output, shape, dense_strides(shape))


def lower(
    trace: Trace, dtype: torch.dtype, heads: int, head_size: int, kinds: Kinds | None, positions: int
) -> Program:  # fmt: skip
    """heads, head_size: of keys and values. kinds: of weights by their numbers, others have none; linears of one input
    whose weights are of one kind become one product; None: no linears do. positions: that the tables are to know.
    Raises NotFused."""
    values = Values(trace)
    lowering = Lowering(trace, dtype, values)
    order = _Order(trace.calls, values)
    if trace.given:
        lowering.views[trace.hidden] = lowering.new(trace.hidden)
        order.made([trace.hidden])
    while order.rows or order.stages:
        while order.rows:
            call = order.take(order.rows)
            _run(lowering, call)
            order.done(call)
        if order.stages:
            _run_stage(lowering, order, kinds)
    if order.missing:
        raise NotFused(f"{trace.calls[min(order.missing)].op} waits for something that is never computed")
    hidden, logits = (lowering.whole(lowering.view(number)) for number in (trace.hidden, trace.logits))
    lowering.close_rows()
    _place_tables(lowering, positions)
    buffers = place(lowering.stages, (hidden, logits))
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
            heapq.heappush(self.stages if self.calls[index].op in _STAGES else self.rows, index)

    def take(self, ready: list[int]) -> Call:
        """The first one of those that are ready."""
        return self.calls[heapq.heappop(ready)]

    def done(self, call: Call) -> None:
        self.made([argument.number for argument in call.args[:2]] if call.op is _WRITE else call.outputs)

    def made(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for index in self._waiting.pop(number, ()):
                self.missing[index] -= 1
                self._sort(index)


def _run_stage(lowering: Lowering, order: _Order, kinds: Kinds | None) -> None:
    first = order.take(order.stages)
    calls = [first]
    if first.op is _ATTEND:
        _attention(lowering, first)
    elif first.op is _GROUPED:
        _grouped(lowering, first)
    else:
        view = lowering.view(first.args[0].number)
        for index in sorted(order.stages):
            call = order.calls[index]
            reads_it = call.op is _LINEAR and _same(lowering.view(call.args[0].number), view)
            if reads_it and kinds is not None and kinds.get(call.args[1].number) == kinds.get(first.args[1].number):
                calls.append(call)
                order.stages.remove(index)
        heapq.heapify(order.stages)
        _product(lowering, calls)
    for call in calls:
        order.done(call)


def _same(a: View, b: View) -> bool:
    """Whether two inputs of products are one."""
    return a.base is b.base and a.offset == b.offset and (a == b or (a.is_whole() and b.is_whole()))


def _place_tables(lowering: Lowering, positions: int) -> None:
    tables = lowering.values.tables(lowering.tables, positions)
    for number, base in lowering.tables.items():
        base.place = lowering.keep(tables[number].reshape(positions, -1))
