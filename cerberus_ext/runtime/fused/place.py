"""Where the values of a program lie: in the scratch of a stage, or in buffers, which later values use again."""

from __future__ import annotations

from collections.abc import Sequence

from .program import (
    REDUCTIONS,
    Attention,
    Base,
    Grouped,
    Instruction,
    Product,
    RowOp,
    Rows,
    Space,
    Stage,
    View,
    size_of,
)

_ALIGNMENT = 16  # elements of scratch: a cache line


def place(stages: Sequence[Stage], results: Sequence[Base]) -> list[Base]:
    """Settles space and place of all bases -> one base for each buffer. results: the bases of buffers of their own."""
    for stage in stages:
        if isinstance(stage, Rows):
            _drop_copies(stage, {base for other in stages if other is not stage for base in _bases(other)}, results)
    spans = _spans(stages)
    shared: set[Base] = {*results}
    for stage in stages:
        if not isinstance(stage, Rows):
            shared |= _bases(stage)
    shared |= {base for base, (first, last) in spans.items() if first != last}
    buffers = _place_buffers(spans, shared, results)
    for stage in stages:
        if isinstance(stage, Rows):
            _place_scratch(stage)
    return buffers


def _bases(stage: Stage) -> set[Base]:
    if isinstance(stage, Product):
        return {stage.input, stage.output}
    if isinstance(stage, Grouped):
        return {stage.input, stage.output, stage.chosen}
    if isinstance(stage, Attention):
        return {stage.query, stage.output}
    return {base for instruction in stage.instructions for base in instruction.bases() if not base.fixed}


def _spans(stages: Sequence[Stage]) -> dict[Base, tuple[int, int]]:
    """The first and the last stage that uses each base."""
    spans: dict[Base, tuple[int, int]] = {}
    for index, stage in enumerate(stages):
        for base in _bases(stage):
            spans[base] = (spans.get(base, (index, index))[0], index)
    return spans


def _place_buffers(spans: dict[Base, tuple[int, int]], shared: set[Base], results: Sequence[Base]) -> list[Base]:
    buffers: list[Base] = []
    free_from: list[int] = []  # by buffer: the stage from which on it is free
    for base in sorted(shared, key=lambda base: spans[base]):
        first, last = spans[base]
        fitting = [
            index
            for index, buffer in enumerate(buffers)
            if (buffer.width, buffer.dtype) == (base.width, base.dtype) and free_from[index] <= first
        ]
        if base in results or not fitting:
            buffers.append(base)
            free_from.append(0)
            fitting = [len(buffers) - 1]
        base.space, base.place = Space.BUFFER, fitting[0]
        # A result is whole at the end alone.
        free_from[fitting[0]] = 1 << 60 if base in results else last + 1
    return buffers


def _place_scratch(rows: Rows) -> None:
    last_use: dict[Base, int] = {}
    for index, instruction in enumerate(rows.instructions):
        for used in instruction.bases():
            if used.space is Space.SCRATCH:
                last_use[used] = index
    live: list[Base] = []
    placed: set[Base] = set()
    for index, instruction in enumerate(rows.instructions):
        made = instruction.to.base
        if made in last_use and made not in placed:
            assert made is not None
            placed.add(made)
            made.place = _gap(live, made.width)
            live.append(made)
            rows.scratch = max(rows.scratch, made.place + made.width)
        live = [base for base in live if last_use[base] > index]


def _gap(live: Sequence[Base], width: int) -> int:
    """The first place for so many elements between those that are in use."""
    begin = 0
    for base in sorted(live, key=lambda base: base.place):
        if begin + width <= base.place:
            break
        begin = max(begin, -(-(base.place + base.width) // _ALIGNMENT) * _ALIGNMENT)
    return begin


def _drop_copies(rows: Rows, elsewhere: set[Base], results: Sequence[Base]) -> None:
    """What is computed in this stage to be copied once is written to where the copy would be."""
    uses: dict[Base, int] = {}
    makers: dict[Base, list[Instruction]] = {}
    for instruction in rows.instructions:
        assert instruction.to.base is not None
        makers.setdefault(instruction.to.base, []).append(instruction)
        for view in (instruction.a, instruction.b):
            if view is not None and view.base is not None:
                uses[view.base] = uses.get(view.base, 0) + 1
    for copy in [found for found in rows.instructions if found.op is RowOp.COPY]:
        base = copy.a.base
        if base is None or base.fixed or base in elsewhere or base in results or uses.get(base) != 1:
            continue
        made = makers.get(base, [])
        if len(made) == 1 and _redirect(made[0], copy):
            rows.instructions.remove(copy)
            assert copy.to.base is not None
            others = makers[copy.to.base]
            others[others.index(copy)] = made[0]


def _redirect(maker: Instruction, copy: Instruction) -> bool:
    """Lets the maker write to where the copy does, if it writes the same elements under the same shape."""
    target, made, read = copy.to, maker.to, copy.a
    # Both list all elements of the base: which axis of the copy is which of the maker is told by the strides.
    axes = {(size, stride) for size, stride in zip(made.shape, made.strides, strict=True) if stride}
    copied = zip(read.shape, read.strides, target.strides, strict=True)
    new = {(size, stride): to for size, stride, to in copied if stride}
    if read.offset or made.offset or axes != set(new):
        return False
    if size_of(read.shape) != size_of(made.shape):  # the copy has some elements more than once
        return False
    if target.base is not None and target.base.space in (Space.KEYS, Space.VALUES) and maker.op in REDUCTIONS:
        return False
    strides = tuple(new.get(axis, 0) for axis in zip(made.shape, made.strides, strict=True))
    maker.to = View(target.base, made.shape, strides, target.offset)
    maker.round = maker.round or copy.round
    return True
