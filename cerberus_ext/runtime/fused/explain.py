"""A program as text: a line for each stage, with the time that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .program import Attention, Base, Grouped, Instruction, Product, Program, Space, Stage, View


def explain(program: Program, seconds: Sequence[float], packed: Mapping[str, int]) -> str:
    """seconds: of each stage; empty: not measured. packed: of how many products the weights are which copies in the
    processor's order."""
    total = f", {1e3 * sum(seconds):.2f} ms" if seconds else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in packed.items()) or "the model's own"
    lines = [
        f"{len(program.stages)} stages{total}; weights: {kinds}; {len(program.buffers)} buffers,"
        f" tables of {program.positions} positions"
    ]
    for place, stage in enumerate(program.stages):
        head, *rest = _lines(stage)
        time = f"{1e6 * seconds[place]:8.1f} us  " if seconds else ""
        lines += [f"{time}{head}", *(f"{'':13}{line}" for line in rest)]
    return "\n".join(lines)


def _lines(stage: Stage) -> Iterator[str]:
    if isinstance(stage, Product):
        in_size, out_size, _ = stage.sizes
        names = ", ".join(name.removesuffix(".weight") for name in stage.names)
        to = f"{_base(stage.output)}+{stage.first}" if stage.first else _base(stage.output)
        yield f"product    {to} = {_base(stage.input)}, {in_size} -> {out_size}: {names}"
    elif isinstance(stage, Grouped):
        in_size, out_size, groups = stage.sizes
        of = f"{in_size} -> {out_size}, {stage.chosen.width} of {groups} by {_base(stage.chosen)}"
        yield f"grouped    {_base(stage.output)} = {_base(stage.input)}, {of}: {stage.name}"
    elif isinstance(stage, Attention):
        window = f", window {stage.window}" if stage.window else ""
        of = f"{stage.query_heads} heads, layer {stage.layer}{window}"
        yield f"attention  {_base(stage.output)} = {_base(stage.query)}, {of}"
    else:
        yield f"rows       {len(stage.instructions)} instructions, {stage.scratch} floats of scratch"
        yield from map(_instruction, stage.instructions)


def _instruction(instruction: Instruction) -> str:
    operands = ", ".join(_view(view) for view in (instruction.a, instruction.b) if view is not None)
    rounded = " rounded" if instruction.round else ""
    return f"{_view(instruction.to)} = {instruction.op.name.lower()}({operands}){rounded}"


def _view(view: View) -> str:
    if view.base is None:
        return f"{view.number:g}"
    begin = f"+{view.offset}" if view.offset else ""
    return f"{_base(view.base)}{begin}"


def _base(base: Base) -> str:
    return f"{base.space.name.lower()}[{base.place}]" if base.space is not Space.TOKEN else "embedding"
