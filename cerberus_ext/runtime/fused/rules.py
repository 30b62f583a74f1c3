"""Which instructions compute what an ATen op does to one row: the rules by which calls are lowered, by op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .lowering import Lowering
from .program import RowOp, View
from .trace import NODES, Call, NotFused
from .views import broadcast

_ATEN = torch.ops.aten
_ACTIVATIONS = {
    "silu": RowOp.SILU, "gelu": RowOp.GELU, "gelu_tanh": RowOp.GELU_TANH, "tanh": RowOp.TANH,
    "sigmoid": RowOp.SIGMOID, "exp": RowOp.EXP, "erf": RowOp.ERF, "softplus": RowOp.SOFTPLUS,
    "cos": RowOp.COS, "sin": RowOp.SIN,
}  # fmt: skip

Emitter = Callable[[Lowering, Call], View]


def _unary(op: RowOp) -> Emitter:
    def emit(lowering: Lowering, call: Call) -> View:
        to = lowering.new(call.outputs[0])
        return lowering.emit(op, to, lowering.operand(call.args[0], to.shape))

    return emit


def _binary(op: RowOp, swapped: bool = False) -> Emitter:
    def emit(lowering: Lowering, call: Call) -> View:
        if call.kwargs.get("alpha", 1) != 1 or len(call.args) > 2 or set(call.kwargs) - {"alpha"}:
            raise NotFused(f"{call.op} is called with {call.kwargs or call.args[2:]}")
        to = lowering.new(call.outputs[0])
        a, b = (lowering.operand(argument, to.shape) for argument in call.args)
        if b.base is None and b.number == 1 and op in (RowOp.MUL, RowOp.DIV) and not swapped and _keeps(a, to):
            return a
        return lowering.emit(op, to, b, a) if swapped else lowering.emit(op, to, a, b)

    return emit


def _keeps(a: View, to: View) -> bool:
    """Whether a value can stand for one of another dtype: nothing is rounded."""
    assert to.base is not None
    return a.base is not None and a.base.dtype in (to.base.dtype,)


def _clamp(lowering: Lowering, call: Call) -> View:
    to = lowering.new(call.outputs[0])
    result = lowering.operand(call.args[0], to.shape)
    limits = zip((RowOp.MAXIMUM, RowOp.MINIMUM), (*call.args[1:], None), strict=False)
    for op, limit in limits:
        if limit is not None:
            result = lowering.emit(op, to, result, lowering.operand(limit, to.shape))
    return result


def _power(lowering: Lowering, call: Call) -> View:
    to = lowering.new(call.outputs[0])
    x, power = lowering.operand(call.args[0], to.shape), call.args[1]
    if power == 2:
        return lowering.emit(RowOp.MUL, to, x, x)
    if power == 3:
        return lowering.emit(RowOp.MUL, to, lowering.emit(RowOp.MUL, lowering.scratch(to.shape), x, x), x)
    ops = {0.5: RowOp.SQRT, -0.5: RowOp.RSQRT, -1: RowOp.RECIPROCAL}
    if power not in ops:
        raise NotFused(f"a power of {power} is not known")
    return lowering.emit(ops[power], to, x)


def _copy(lowering: Lowering, call: Call) -> View:
    """To another dtype: only what is rounded costs anything."""
    to = lowering.new(call.outputs[0])
    a = lowering.operand(call.args[0], to.shape)
    assert to.base is not None
    if a.base is not None and (a.base.dtype == to.base.dtype or to.base.dtype == torch.float32):
        return a
    return lowering.emit(RowOp.COPY, to, a)


def _expand(lowering: Lowering, call: Call) -> View:
    return broadcast(lowering.view(call.args[0].number), lowering.trace.shapes[call.outputs[0]])


def _cat(lowering: Lowering, call: Call) -> View:
    to = lowering.new(call.outputs[0])
    axis = (call.args[1] if len(call.args) > 1 else 0) % len(to.shape)
    begin = 0
    for part in call.args[0]:
        size = lowering.trace.shapes[part.number][axis]
        if size == 0:
            continue
        shape = (*to.shape[:axis], size, *to.shape[axis + 1 :])
        place = replace(to, shape=shape, offset=to.offset + begin * to.strides[axis])
        lowering.emit(RowOp.COPY, place, lowering.operand(part, shape))
        begin += size
    return to


def _stack(lowering: Lowering, call: Call) -> View:
    to = lowering.new(call.outputs[0])
    axis = (call.args[1] if len(call.args) > 1 else 0) % len(to.shape)
    rest = [i for i in range(len(to.shape)) if i != axis]
    for number, part in enumerate(call.args[0]):
        shape, strides = (tuple(of[i] for i in rest) for of in (to.shape, to.strides))
        place = View(to.base, shape, strides, to.offset + number * to.strides[axis])
        lowering.emit(RowOp.COPY, place, lowering.operand(part, shape))
    return to


def _reduce(op: RowOp) -> Emitter:
    def emit(lowering: Lowering, call: Call) -> View:
        a = lowering.view(call.args[0].number)
        axes, keep = call.args[1], len(call.args) > 2 and call.args[2]
        axes = (axes,) if isinstance(axes, int) else axes
        if axes is None or [axis % len(a.shape) for axis in axes] != [len(a.shape) - 1] or len(call.args) > 3:
            raise NotFused(f"{call.op} is not over the last axis alone")
        if call.kwargs.get("dtype") not in (None, lowering.trace.dtypes[call.outputs[0]]):
            raise NotFused(f"{call.op} is called with {call.kwargs}")
        to = lowering.new(call.outputs[0])
        if keep:
            return lowering.emit(op, to, a)
        lowering.emit(op, _as_results(to), a)
        return to

    return emit


def _last_axis(shape: Sequence[int], call: Call, axis: int) -> None:
    if axis % len(shape) != len(shape) - 1 or shape[-1] == NODES:
        raise NotFused(f"{call.op} is not over the last axis alone")


def _topk(lowering: Lowering, call: Call) -> tuple[View, View]:
    """Places are float32, which holds all that there are."""
    a, (count, axis, largest, in_order) = lowering.view(call.args[0].number), (*call.args[1:], -1, True, True)[:4]
    _last_axis(a.shape, call, axis)
    if not largest or not in_order or count < 1:
        raise NotFused(f"{call.op} is called with {call.args[1:]}")
    values = lowering.new(call.outputs[0])
    row = (*values.shape, a.shape[-1])
    run = replace(a, shape=row, strides=(*a.strides[:-1], 0, a.strides[-1]))
    places = lowering.scratch(values.shape)
    lowering.emit(RowOp.TOP, _as_results(places), run)
    lowering.emit(RowOp.PICK, _as_results(values), run, broadcast(_as_results(places), row))
    return values, places


def _gather(lowering: Lowering, call: Call) -> View:
    a, places = lowering.view(call.args[0].number), lowering.view(call.args[2].number)
    _last_axis(a.shape, call, call.args[1])
    if a.shape[:-1] != places.shape[:-1]:
        raise NotFused(f"{call.op} of {a.shape} by {places.shape}")
    to = lowering.new(call.outputs[0])
    row = (*to.shape, a.shape[-1])
    run = replace(a, shape=row, strides=(*a.strides[:-1], 0, a.strides[-1]))
    lowering.emit(RowOp.PICK, _as_results(to), run, broadcast(_as_results(places), row))
    return to


def _as_results(view: View) -> View:
    """Each element as what a run of its own is reduced to."""
    return replace(view, shape=(*view.shape, 1), strides=(*view.strides, 0))


def _activation(lowering: Lowering, call: Call) -> View:
    return _unary(_ACTIVATIONS[call.args[1]])(lowering, call)


def _layer_norm(lowering: Lowering, call: Call) -> View:
    """In float32, rounded once: centred, divided by the root of the mean square, scaled and moved."""
    x, shape, weight, bias, epsilon = call.args
    to = lowering.new(call.outputs[0])
    if len(shape) != 1:
        raise NotFused(f"{call.op} is not over the last axis alone")
    row, one = to.shape, (*to.shape[:-1], 1)
    emit, new = lowering.emit, lowering.scratch
    a = lowering.operand(x, row)

    def wide(view: View) -> View:
        return replace(view, shape=row, strides=(*view.strides[:-1], 0))

    mean = emit(RowOp.MEAN, new(one), a)
    centred = emit(RowOp.SUB, new(row), a, wide(mean))
    squares = emit(RowOp.MUL, new(row), centred, centred)
    variance = emit(RowOp.MEAN, new(one), squares)
    epsilon_view = View(None, one, (0,) * len(one), 0, epsilon)
    root = emit(RowOp.RSQRT, new(one), emit(RowOp.ADD, new(one), variance, epsilon_view))
    scaled = emit(RowOp.MUL, to if weight is None and bias is None else new(row), centred, wide(root))
    if weight is not None:
        scaled = emit(RowOp.MUL, to if bias is None else new(row), scaled, lowering.operand(weight, row))
    return scaled if bias is None else emit(RowOp.ADD, to, scaled, lowering.operand(bias, row))


EMITTERS: dict[Any, Callable[[Lowering, Call], View | tuple[View, ...]]] = {
    _ATEN.add.Tensor: _binary(RowOp.ADD),
    _ATEN.add_.Tensor: _binary(RowOp.ADD),
    _ATEN.sub.Tensor: _binary(RowOp.SUB),
    _ATEN.rsub.Scalar: _binary(RowOp.SUB, swapped=True),
    _ATEN.mul.Tensor: _binary(RowOp.MUL),
    _ATEN.mul_.Tensor: _binary(RowOp.MUL),
    _ATEN.div.Tensor: _binary(RowOp.DIV),
    _ATEN.div_.Tensor: _binary(RowOp.DIV),
    _ATEN.maximum.default: _binary(RowOp.MAXIMUM),
    _ATEN.minimum.default: _binary(RowOp.MINIMUM),
    _ATEN.clamp.default: _clamp,
    _ATEN.pow.Tensor_Scalar: _power,
    _ATEN.neg.default: _unary(RowOp.NEG),
    _ATEN.abs.default: _unary(RowOp.ABS),
    _ATEN.sqrt.default: _unary(RowOp.SQRT),
    _ATEN.rsqrt.default: _unary(RowOp.RSQRT),
    _ATEN.reciprocal.default: _unary(RowOp.RECIPROCAL),
    _ATEN.relu.default: _unary(RowOp.RELU),
    _ATEN.mean.dim: _reduce(RowOp.MEAN),
    _ATEN.sum.dim_IntList: _reduce(RowOp.SUM),
    _ATEN.amax.default: _reduce(RowOp.MAX),
    _ATEN._to_copy.default: _copy,
    _ATEN.expand.default: _expand,
    _ATEN.cat.default: _cat,
    _ATEN.stack.default: _stack,
    _ATEN.topk.default: _topk,
    _ATEN.gather.default: _gather,
    _ATEN.native_layer_norm.default: _layer_norm,
    torch.ops.cerberus_ext.activation.default: _activation,
}
