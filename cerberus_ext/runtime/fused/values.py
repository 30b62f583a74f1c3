"""What the values of a traced step are: constants, functions of the position, and rows of their own for every node.

Constants are computed here and now. What depends on positions alone becomes a table, a row for each position: the
calls run on real tensors, NODES positions at a time, which is what they were traced for.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

import torch
from torch import Tensor

from .trace import NODES, Call, Trace, evaluate, node_axis, refs
from .views import ARRANGING, RESHAPING


class Kind(Enum):
    CONSTANT = 0
    POSITIONAL = 1
    ROW = 2
    TOKENS = 3  # the tokens of the nodes
    OTHER = 4  # lengths, ancestors, the cache
    MIXED = 5  # depends on the positions of all nodes, and whatever depends on that


class Values:
    """kinds: of every value, by its number."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._made_by: dict[int, Call] = {}
        self._constants: dict[int, Tensor] = dict(trace.weights)
        self.kinds: dict[int, Kind] = dict.fromkeys(trace.weights, Kind.CONSTANT)
        self.kinds |= dict.fromkeys((trace.length, trace.ancestors, *trace.planes), Kind.OTHER)
        self.kinds |= {trace.tokens: Kind.TOKENS, trace.positions: Kind.POSITIONAL}
        if trace.given:
            self.kinds[trace.hidden] = Kind.ROW
        for call in trace.calls:
            kind = self._kind(call)
            for number in call.outputs:
                self.kinds[number] = kind
                self._made_by[number] = call

    def _kind(self, call: Call) -> Kind:
        kinds = {self.kinds[number] for number in refs(call)}
        if not kinds - {Kind.CONSTANT}:
            return Kind.CONSTANT
        if kinds == {Kind.TOKENS} and (call.op in RESHAPING or call.op in ARRANGING):
            return Kind.TOKENS
        if Kind.MIXED in kinds:
            return Kind.MIXED
        if kinds - {Kind.CONSTANT, Kind.POSITIONAL}:
            return Kind.ROW
        each = all(tuple(self.trace.shapes[number]).count(NODES) == 1 for number in call.outputs)
        return Kind.POSITIONAL if each else Kind.MIXED

    def constant(self, number: int) -> Tensor:
        """The tensor. Raises NotFused where it differs between the nodes of a step."""
        if number not in self._constants:
            call = self._made_by[number]
            for needed in refs(call):
                self.constant(needed)
            self._constants |= zip(call.outputs, evaluate(call, self._constants), strict=True)
        return self._constants[number]

    def tables(self, numbers: Iterable[int], positions: int) -> dict[int, Tensor]:
        """Of positional values: (positions, ...) each, without the axis of the nodes."""
        numbers = list(numbers)
        calls = self._calls_for(numbers)
        for call in calls:
            for needed in refs(call):
                if self.kinds[needed] is Kind.CONSTANT:
                    self.constant(needed)
        parts: dict[int, list[Tensor]] = {number: [] for number in numbers}
        for begin in range(0, positions, NODES):
            found = dict(self._constants)
            some = torch.arange(begin, begin + NODES, device=self.trace.device)
            found[self.trace.positions] = some.clamp(max=positions - 1)[None]
            for call in calls:
                found |= zip(call.outputs, evaluate(call, found), strict=True)
            for number in numbers:
                axis = node_axis(self.trace.shapes[number])
                parts[number].append(found[number].movedim(axis, 0))
        return {number: torch.cat(chunks)[:positions].contiguous() for number, chunks in parts.items()}

    def _calls_for(self, numbers: list[int]) -> list[Call]:
        needed = set(numbers)
        calls: list[Call] = []
        for call in reversed(self.trace.calls):
            if needed.intersection(call.outputs) and self.kinds[call.outputs[0]] is Kind.POSITIONAL:
                calls.append(call)
                needed.update(refs(call))
        return calls[::-1]
