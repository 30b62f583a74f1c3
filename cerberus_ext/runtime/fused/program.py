"""The program of a step, and its code: what csrc/step/step.h describes."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from .trace import NODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class RowOp(IntEnum):
    """What an instruction does, as in csrc/args.h."""

    COPY = 0
    ADD = 1
    SUB = 2
    MUL = 3
    DIV = 4
    MAXIMUM = 5
    MINIMUM = 6
    NEG = 7
    ABS = 8
    SQRT = 9
    RSQRT = 10
    RECIPROCAL = 11
    MEAN = 12
    SUM = 13
    MAX = 14
    SILU = 16
    GELU = 17
    GELU_TANH = 18
    TANH = 19
    SIGMOID = 20
    EXP = 21
    ERF = 22
    SOFTPLUS = 23
    COS = 24
    SIN = 25
    RELU = 30
    TOP = 31
    PICK = 32


REDUCTIONS = (RowOp.MEAN, RowOp.SUM, RowOp.MAX, RowOp.TOP, RowOp.PICK)


class Space(IntEnum):
    """Where an operand lies."""

    NONE = 0
    SCRATCH = 1
    BUFFER = 2
    CONSTANT = 3
    POSITION = 4
    TOKEN = 5
    KEYS = 6
    VALUES = 7
    NUMBER = 8


@dataclass(eq=False)
class Base:
    """Memory for one value of every node. dtype: float32, or the model's. space, place: where, once that is settled."""

    width: int
    dtype: torch.dtype
    space: Space = Space.SCRATCH
    place: int = 0  # scratch: its first element; else the index of the buffer, the constant or the layer
    fixed: bool = False  # not to be placed


@dataclass(frozen=True)
class View:
    """Elements of a base for one node, under the shape of all nodes: their axis, NODES long, has a stride of 0, as has
    every axis along which the same element stands again and again. number: the value itself, no base."""

    base: Base | None
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    number: float = 0.0

    def is_whole(self) -> bool:
        """Whether it is all of its base, in order."""
        assert self.base is not None
        whole = size_of(self.shape) == self.base.width and self.offset == 0
        return whole and all(
            size in (1, NODES) or got == want
            for size, got, want in zip(self.shape, self.strides, dense_strides(self.shape), strict=True)
        )


@dataclass(eq=False)
class Instruction:
    """to = op(a, b), over the shape of `to` (of a reduction: of a)."""

    op: RowOp
    round: bool
    to: View
    a: View
    b: View | None = None

    def bases(self) -> Iterator[Base]:
        for view in (self.to, self.a, self.b):
            if view is not None and view.base is not None:
                yield view.base


@dataclass(eq=False)
class Rows:
    instructions: list[Instruction] = field(default_factory=list)
    scratch: int = 0


@dataclass(eq=False)
class Product:
    """weights: each (O_i, I), for consecutive parts of the output. names: of their modules. first: the element of the
    output at which it begins; None: it fills it."""

    input: Base
    output: Base
    weights: list[Tensor]
    biases: list[Tensor | None]
    names: list[str]
    first: int | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """I, O, 1."""
        return self.input.width, sum(len(weight) for weight in self.weights), 1


@dataclass(eq=False)
class Grouped:
    """weight (G, O, I), transposed (G, I, O): of all groups. chosen: float32, those of each node. shared: one input for
    all of them."""

    input: Base
    output: Base
    chosen: Base
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    name: str

    @property
    def sizes(self) -> tuple[int, int, int]:
        """I, O, G."""
        groups, out_size, in_size = self.weight.shape
        return (out_size, in_size, groups) if self.transposed else (in_size, out_size, groups)


@dataclass(eq=False)
class Attention:
    layer: int
    query: Base
    output: Base
    query_heads: int
    scale: float
    window: int
    softcap: float
    sinks: int  # constant; -1: none


Stage = Rows | Product | Attention | Grouped


@dataclass
class Program:
    dtype: torch.dtype
    layers: int
    kv_heads: int
    head_size: int
    constants: list[Tensor]  # operands of rows, and sinks
    stages: list[Stage]
    hidden: Base
    logits: Base
    buffers: list[Base]  # one for each: those that share it have its width and dtype
    positions: int  # that its tables know


def size_of(shape: Sequence[int]) -> int:
    """Elements of one node."""
    return math.prod(size for size in shape if size != NODES)


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of one node's elements in order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(0 if size in (1, NODES) else step)
        step *= 1 if size == NODES else size
    return tuple(reversed(strides))


_PACKINGS = {torch.uint8: 1, torch.int8: 2, torch.int16: 3, torch.int32: 4, torch.int64: 5, torch.uint16: 6}


def encode(program: Program, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[list[Tensor], Tensor]:
    """weights: of every product in turn: packed, as its dtype says, or as the stage has them.
    biases: all of a product's in one tensor -> tensors, code (n,) int64."""
    tensors = [*program.constants, *weights]
    first_weight = len(program.constants)
    code = [
        1, DTYPES.index(program.dtype), program.layers, program.kv_heads, program.head_size, len(program.buffers),
        len(program.stages), program.hidden.place, program.logits.place,
    ]  # fmt: skip
    for buffer in program.buffers:
        code += [buffer.width, int(buffer.dtype != program.dtype)]
    index = 0
    for stage in program.stages:
        if isinstance(stage, (Product, Grouped)):
            weight, bias = weights[index], biases[index]
            if bias is not None:
                tensors.append(bias)
            in_size, out_size, groups = stage.sizes
            kind = 3 if isinstance(stage, Grouped) else 0 if stage.first is None else 4
            code += [kind, stage.input.place, stage.output.place]
            code += [first_weight + index, in_size, out_size, -1 if bias is None else len(tensors) - 1]
            code.append(_PACKINGS.get(weight.dtype, 0))
            if isinstance(stage, Product) and stage.first is not None:
                code.append(stage.first)
            if isinstance(stage, Grouped):
                shared = stage.input.width == in_size
                code += [int(stage.transposed), groups, stage.chosen.place, stage.chosen.width, int(shared)]
            index += 1
        elif isinstance(stage, Rows):
            lines = [line for instruction in stage.instructions for line in _lines(instruction)]
            code += [1, stage.scratch, len(lines), *(number for line in lines for number in line)]
        else:
            code += [2, stage.layer, stage.query.place, stage.output.place, stage.query_heads, _bits(stage.scale)]
            code += [stage.window, _bits(stage.softcap), stage.sinks]
    return tensors, torch.tensor(code, dtype=torch.int64)


def _lines(instruction: Instruction) -> Iterator[list[int]]:
    """The instruction as one of at most three axes, or as several."""
    views = [view for view in (instruction.to, instruction.a, instruction.b) if view is not None]
    reduces = instruction.op in REDUCTIONS
    shape = list(instruction.a.shape if reduces else instruction.to.shape)
    in_cache = instruction.to.base is not None and instruction.to.base.space in (Space.KEYS, Space.VALUES)
    # Per axis its size, and the stride of every operand; the last ones stay as they are: the axis that is
    # reduced, of TOP the one of its results, too; heads and their elements, which do not lie side by side in the cache.
    kept = 2 if in_cache or instruction.op is RowOp.TOP else 1 if reduces else 0
    axes = [(size, [view.strides[i] for view in views]) for i, size in enumerate(shape) if size != NODES]
    axes = [axis for i, axis in enumerate(axes) if axis[0] > 1 or i >= len(axes) - kept]
    merged: list[tuple[int, list[int]]] = []
    for place, (size, strides) in enumerate(axes):
        last = merged[-1] if merged else None
        mergeable = last is not None and place < len(axes) - kept
        if mergeable and last is not None and all(o == s * size for o, s in zip(last[1], strides, strict=True)):
            merged[-1] = (last[0] * size, strides)
        else:
            merged.append((size, strides))
    while len(merged) < 3:
        merged.insert(0, (1, [0] * len(views)))
    outer, (n2, n1, n0) = merged[:-3], merged[-3:]
    if in_cache and n1[0] == 1:  # a single head: its axis has no stride of its own, a step wants that of several
        n1[1][0] = n0[0]
    offsets = [[view.offset for view in views]]
    for size, strides in outer:
        offsets = [
            [offset + i * stride for offset, stride in zip(base, strides, strict=True)]
            for base in offsets
            for i in range(size)
        ]
    for begin in offsets:
        line = [int(instruction.op), int(instruction.round), n2[0], n1[0], n0[0]]
        for place, view in enumerate(views):
            line += _operand(view, begin[place], [axis[1][place] for axis in (n2, n1, n0)])
        yield line + [0] * (23 - len(line))


def _operand(view: View, offset: int, strides: list[int]) -> list[int]:
    if view.base is None:
        return [Space.NUMBER, 0, _bits(view.number), 0, 0, 0]
    if view.base.space is Space.SCRATCH:
        return [Space.SCRATCH, 0, view.base.place + offset, *strides]
    return [view.base.space, view.base.place, offset, *strides]


def _bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])
