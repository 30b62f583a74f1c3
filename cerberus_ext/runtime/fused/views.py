"""ATen's views on rows: what selects and arranges elements without computing any.

See View: the axis of the nodes stands in its shape, and is told by its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .program import View, size_of
from .trace import NODES, NotFused, node_axis

aten = torch.ops.aten


def reshaped(view: View, new: Sequence[int]) -> View | None:
    """None: not without copying. Raises NotFused where the nodes' axis would be split up or moved."""
    old, shape = view.shape, tuple(new)
    before, after = node_axis(old), node_axis(shape)
    if size_of(old[before + 1 :]) != size_of(shape[after + 1 :]):
        raise NotFused(f"the model mixes the tokens of a step: {old} becomes {shape}")
    strides = _strides(old, view.strides, shape)
    return None if strides is None else replace(view, shape=shape, strides=strides)


def _strides(shape: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Those of the same elements in another shape; None: there are none."""
    old = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size not in (1, NODES)]
    found: list[int] = [0] * len(new)
    place = len(new) - 1
    while old:
        # The innermost axes that lie as one, to be cut up anew.
        size, stride = old.pop()
        whole = size
        while old and old[-1][1] == stride * whole:
            whole *= old.pop()[0]
        step, rest = stride, whole
        while rest > 1:
            if place >= 0 and new[place] in (1, NODES):
                place -= 1
                continue
            if place < 0 or rest % new[place]:
                return None
            found[place] = step
            step *= new[place]
            rest //= new[place]
            place -= 1
    return tuple(found)


def broadcast(view: View, shape: Sequence[int]) -> View:
    """The same value for every element of a larger shape."""
    missing = len(shape) - len(view.shape)
    old = (1,) * missing + view.shape
    strides = (0,) * missing + view.strides
    return replace(
        view,
        shape=tuple(shape),
        strides=tuple(0 if size == 1 else stride for size, stride in zip(old, strides, strict=True)),
    )


def _permuted(view: View, order: Sequence[int]) -> View:
    return replace(view, shape=tuple(view.shape[i] for i in order), strides=tuple(view.strides[i] for i in order))


def _transpose(view: View, first: int, second: int) -> View:
    order = list(range(len(view.shape)))
    order[first], order[second] = order[second], order[first]
    return _permuted(view, order)


def _unsqueeze(view: View, axis: int) -> View:
    axis %= len(view.shape) + 1
    return replace(
        view,
        shape=(*view.shape[:axis], 1, *view.shape[axis:]),
        strides=(*view.strides[:axis], 0, *view.strides[axis:]),
    )


def _squeeze(view: View, axes: Any = None) -> View:
    rank = len(view.shape)
    asked = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    gone = {axis % rank for axis in asked if view.shape[axis] == 1}
    kept = [axis for axis in range(rank) if axis not in gone]
    return _permuted(view, kept)


def _slice(view: View, axis: int = 0, begin: int | None = None, end: int | None = None, step: int = 1) -> View:
    begin, end, step = slice(begin, end, step).indices(view.shape[axis])
    stride = view.strides[axis]
    shape, strides = list(view.shape), list(view.strides)
    shape[axis], strides[axis] = len(range(begin, end, step)), stride * step
    return replace(view, shape=tuple(shape), strides=tuple(strides), offset=view.offset + begin * stride)


def _select(view: View, axis: int, index: int) -> View:
    axis %= len(view.shape)
    index %= view.shape[axis]
    kept = [i for i in range(len(view.shape)) if i != axis]
    return replace(_permuted(view, kept), offset=view.offset + index * view.strides[axis])


def _split(view: View, sizes: int | Sequence[int], axis: int = 0) -> list[View]:
    total = view.shape[axis]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - begin) for begin in range(0, total, sizes)]
    parts, begin = [], 0
    for size in sizes:
        parts.append(_slice(view, axis, begin, begin + size))
        begin += size
    return parts


def _same(view: View, *args: Any, **kwargs: Any) -> View:
    return view


ARRANGING: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.transpose.int: _transpose,
    aten.permute.default: _permuted,
    aten.t.default: lambda view: _transpose(view, 0, 1),
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.squeeze.default: _squeeze,
    aten.alias.default: _same,
    aten.detach.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh.default: _same,
}
RESHAPING = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
