"""What lowering knows so far: where the values of a traced step lie, and the stages that compute them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .program import Base, Instruction, RowOp, Rows, Space, Stage, View, dense_strides, size_of
from .trace import NODES, NotFused, Ref, Trace, node_axis
from .values import Kind, Values
from .views import broadcast


@dataclass
class Lowering:
    """views: of the row values so far, by number. rows: the instructions of the stage that is being made."""

    trace: Trace
    dtype: torch.dtype
    values: Values
    constants: list[Tensor] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
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
        if kind is Kind.MIXED:
            raise NotFused("what the model computes for a token depends on the positions of the others in the call")
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

    def close_rows(self) -> None:
        if self.rows.instructions:
            self.stages.append(self.rows)
            self.rows = Rows()
