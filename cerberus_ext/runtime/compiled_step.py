"""The target model's steps through torch.compile, on a CPU: what CUDA graphs are on a GPU.

A step is compiled for each number of nodes by itself, piece by piece (step_pieces.py), when the first one of that size
is due. Whatever differs between two steps is an argument, so nothing is compiled again: not for a longer text, another
tree of the same size, other heads or another decode. What is compiled is kept by the model's Runtime; inductor keeps
the machine code on disk, so another process only has to trace the model.

What a step computes for a node is to have the same bits whatever else is in the step, as without compilation:

    linears      are the same as in steps op by op (row_invariant.py)
    precision    is what the model's ops say: where inductor fuses bfloat16 ops, intermediate values are rounded as if
                 they went through memory, since what it fuses depends on the number of nodes
    reductions   are not split over threads where there is one row only

and it is checked when a size is compiled. To a step op by op it is equal up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..drafting.tree import filled_size
from ..target.model import filled
from .replayable import memory_of, obstacle
from .step_pieces import StepProgram, Untraceable, build_program

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..target.cache import TreeCache
    from ..target.model import TargetModel
    from .stats import DecodeStats

_OPTIONS: dict[str, Any] = {
    "emulate_precision_casts": True,
    # The ops between the linears take microseconds, so that a second thread is mostly waited for: at least as many
    # elements for each.
    "cpp.min_chunk_size": 1 << 14,
    # Of every argument at every call, by Python code. Which arguments a piece gets is settled when it is compiled.
    "size_asserts": False,
}
_TOKENS_APART = 7919  # those that the check uses; any, as long as they differ
_CHECKED_ROWS = 4
_ONE_ROW = {"cpp.min_chunk_size": 1 << 40}  # no sum over a row is split


class CompileError(ValueError):
    """The steps of this model, or on this machine, cannot be compiled; the message says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"decode: compile must be False here, got True: {reason}")


class ModelPrograms:
    """What is kept for a model: its compiled steps, by numbers of nodes and threads. It does not keep the model itself.

    row_invariant: whether all sizes compiled so far were found to give a node the same bits; None: there is only one.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.memory = memory_of(model)
        self.row_invariant: bool | None = None
        self._programs: dict[tuple[int, int], StepProgram] = {}
        self._pieces: dict[Any, Callable[..., Any]] = {}

    def get(self, nodes: int) -> StepProgram | None:
        return self._programs.get((torch.get_num_threads(), nodes))

    def compile(self, target: TargetModel, nodes: int) -> StepProgram:
        """target: after its prompt, with room for so many nodes."""
        threads = torch.get_num_threads()

        def compiled(piece: fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
            kinds = tuple((value.shape, value.stride(), value.dtype) for value in examples)
            key = (piece.code, kinds, nodes, threads)
            if key not in self._pieces:
                self._pieces[key] = _compile_piece(piece, examples, nodes)
            return self._pieces[key]

        program = build_program(target, nodes, compiled)
        embeddings: Any = target.model.get_input_embeddings().weight
        tokens = torch.arange(nodes) * _TOKENS_APART % len(embeddings)
        rows = _run_alone(program, target.cache, tokens)
        self._programs[threads, nodes] = program
        others = [size for its_threads, size in self._programs if its_threads == threads and size != nodes]
        if others:
            size = min(others)
            other = self._programs[threads, size]
            checked = range(0, nodes, max(1, nodes // _CHECKED_ROWS))
            same = all(rows[i].equal(_run_alone(other, target.cache, tokens[i].expand(size))[0]) for i in checked)
            self.row_invariant = same and self.row_invariant is not False
        return program


def _compile_piece(piece: fx.GraphModule, examples: list[Tensor], nodes: int) -> Callable[..., Any]:
    """By torch.compile's inductor. Its Dynamo has nothing to find in a graph, and would guard every call of it."""
    from torch import _inductor  # seconds

    options = _OPTIONS | _ONE_ROW if nodes == 1 else _OPTIONS
    with torch.inference_mode(False), torch.no_grad():
        return _inductor.compile(piece, [*examples], options)


def _run_alone(program: StepProgram, cache: TreeCache, tokens: Tensor) -> Tensor:
    """tokens (N,), each as if it were the only one of its step -> hidden states and logits, (N, D + V)."""
    nodes = len(tokens)
    itself = torch.arange(nodes)
    ancestors = torch.zeros(nodes, -(-nodes // 64), dtype=torch.int64)
    ancestors[itself, itself // 64] = 1 << itself % 64
    positions = cache.length[:, None] + torch.zeros_like(itself)
    hidden, logits = program(tokens[None], positions, cache.length, ancestors, cache.planes())
    return torch.cat([hidden[0], logits[0]], 1)


class CompiledSteps:
    """The steps of one decode."""

    def __init__(self, programs: ModelPrograms, sizes: Collection[int], stats: DecodeStats) -> None:
        """sizes: numbers of nodes that steps are compiled for; others are filled up to the next of them."""
        self._programs = programs
        self._sizes = frozenset(sizes)
        self._stats = stats

    def prepare(self, target: TargetModel, nodes: int) -> tuple[StepProgram, int]:
        """The compiled step for at least so many nodes, and for how many it is.

        Raises CompileError.
        """
        size = filled_size(nodes, self._sizes)
        program = self._programs.get(size)
        if program is None:
            begin = time.perf_counter()
            program = self._compile(target, size)
            self._stats.compilations += 1
            self._stats.compile_seconds += time.perf_counter() - begin
        self._stats.row_invariant = self._programs.row_invariant
        return program, size

    def step(self, target: TargetModel, tokens: Tensor, positions: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
        """tokens, positions (B, N), ancestors (N, W) -> hidden (B, N, D), logits (B, N, V)."""
        nodes = tokens.shape[1]
        program, size = self.prepare(target, nodes)
        target.cache.check_room(size)
        tokens, positions, ancestors = filled(size, tokens, positions, ancestors)
        cache = target.cache
        hidden, logits = program(tokens, positions, cache.length, ancestors, cache.planes())
        return hidden[:, :nodes], logits[:, :nodes]

    def _compile(self, target: TargetModel, size: int) -> StepProgram:
        target.cache.check_room(size)
        try:
            return self._programs.compile(target, size)
        except Untraceable as error:
            raise CompileError(str(error)) from error
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise CompileError(f"compiling a step failed: {type(error).__name__}: {reason}") from error


def check_compilable(model: PreTrainedModel) -> None:
    """Raises CompileError where it can be told, before any step, that those of this model are never compiled.

    Compiling a step may fail all the same.
    """
    if model.device.type != "cpu":
        raise CompileError(f"the model is on {model.device}, where steps are CUDA graphs")
    if reason := obstacle(model, "a compiled step"):
        raise CompileError(reason)
