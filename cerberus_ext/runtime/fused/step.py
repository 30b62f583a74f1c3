"""Steps of one model as one native call each: what is kept between them, and when it is made anew."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...ops.device_step import DeviceStep
from ...ops.step import (
    BLOCKS,
    NativeStep,
    block_bytes,
    large_memory,
    pack_blocks,
    pack_weights,
    packed_bytes,
    release_mapped,
)
from .device_weights import in_blocks
from .lower import lower
from .parts import parts
from .program import Grouped, Product, Program, encode
from .trace import NotFused, Trace, trace_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...target.cache import TreeCache
    from ...target.model import TargetModel
    from ...target.step_row import StepRow

_ALIGNMENT = 4096  # bytes, of the packed weights of a product
_MIN_POSITIONS = 1024  # that the tables know
_AT_ONCE = 1 << 14  # positions: of a cache with room for more, tables grow as its text does
_ALL_POSITIONS = 1 << 62
_ROWS_OF_A_KIND = 8
_SPARE = 2 << 30  # bytes of memory that packing leaves free

# What runs programs, by the type of the device.
NATIVE: dict[str, type[NativeStep] | type[DeviceStep]] = {"cpu": NativeStep, "cuda": DeviceStep}


class FusedStep:
    """A step of one model: a StepForward, see target/step_row.py. seconds: what making it took, in all.

    pack: whether the weights are copied for the processor; None: where there is memory for it. On a GPU those that came
        out of a file of fewer bits are, in as many; the model keeps its own, which prompts are read with.
    recordable: whether steps may be captured, once one with as many nodes has run. Each of them is of one text.
    """

    def __init__(self, target: TargetModel, pack: bool | None = None) -> None:
        """target: after its prompt. Raises NotFused."""
        begin = time.perf_counter()
        device = target.model.device
        if len(target.cache.length) != 1 or device.type not in NATIVE:
            raise NotFused("there is one for one text on a CPU or a CUDA device")
        self._native_type = NATIVE[device.type]
        self.recordable = self._native_type.recordable
        self._dtype = target.model.dtype
        self._trace: Trace = trace_step(target)
        self._results = [torch.empty(0, 0), torch.empty(0, 0)]
        self._recorded: dict[int, tuple[Tensor, Tensor]] = {}  # results of steps that may be captured, by their nodes
        self._weights: list[Tensor] | None = None
        self._packs = pack is not False and (pack or _has_room(target.model))
        self._kinds: dict[int, torch.dtype | None] | None = None
        if self.recordable:
            self._kinds = {}  # whatever weights are in, all that read one input are joined
        elif self._packs:
            self._kinds = {number: _kind(weight) for number, weight in self._trace.weights.items()}
        self._most_positions = _ALL_POSITIONS
        self._last_position = target.max_positions
        self._make([target.cache], self._positions(target.cache, 1))
        self.seconds = time.perf_counter() - begin

    def _positions(self, cache: TreeCache, nodes: int) -> int:
        """Steps that may be captured have one program, for all that the cache has room for."""
        return table_positions(cache, cache.capacity if self.recordable else nodes)

    def _make(self, caches: Sequence[TreeCache], positions: int) -> None:
        """The program, for so many positions; its weights stay where they are."""
        assert caches[0].tensor is not None
        _, _, heads, _, size = caches[0].tensor.shape
        sizes = (self._trace, self._dtype, heads, size, self._kinds)
        try:
            self.program: Program = lower(*sizes, positions)
        except IndexError:  # the model looks its positions up, and has no more; nor is there a step beyond them
            self.program = lower(*sizes, self._last_position)
            self._most_positions = self._last_position
        if self.recordable:
            self.program.stages = [part for stage in self.program.stages for part in parts(stage)]
        products = [stage for stage in self.program.stages if isinstance(stage, (Product, Grouped))]
        if self._weights is None:
            make = _in_blocks if self.recordable else _weights_of
            self._weights = make(products, self._packs)
        biases = [_bias_of(product, self._dtype) for product in products]
        try:
            self._native = self._native_type(*encode(self.program, self._weights, biases))
        except RuntimeError as error:
            raise NotFused(f"its program was refused: {error}") from error

    def step(self, rows: Sequence[StepRow], logits_of: int | None = None) -> tuple[Tensor, Tensor]:
        """See StepForward; hidden and logits are written over by the next step."""
        for row in rows:
            row.cache.check_room(len(row.tokens))
        needed = max(self._positions(row.cache, len(row.tokens)) for row in rows)
        if min(needed, self._most_positions) > self.program.positions:
            self._make([row.cache for row in rows], needed)
        tokens, positions = joined([row.tokens for row in rows]), joined([row.positions for row in rows])
        wanted = len(tokens) if logits_of is None else logits_of
        hidden, logits = self._memory(len(tokens), wanted)
        lengths, ancestors = [row.cache.length for row in rows], [row.ancestors for row in rows]
        caches = [row.cache.tensor for row in rows if row.cache.tensor is not None]
        self._native.run(tokens, positions, lengths, ancestors, caches, hidden, logits)
        return hidden, logits[len(logits) - wanted :]

    def prepare(self, cache: TreeCache) -> None:
        """Gives the cache its memory, which it has from a model's first forward on."""
        if cache.tensor is None:
            shape = torch.Size((1, self.program.kv_heads, 0, self.program.head_size))
            cache.allocate(shape, torch.empty(0, dtype=self._dtype, device=cache.length.device))

    @property
    def packed(self) -> dict[str, int]:
        """Of how many products the weights are copies, and of which kind."""
        assert self._weights is not None
        kinds = {torch.uint8: "packed", torch.int8: "packed in four bits", torch.uint16: "packed in five bits"}
        kinds |= dict.fromkeys((torch.int32, torch.int64), "packed in eight bits")
        return dict(Counter(kinds[weight.dtype] for weight in self._weights if weight.dtype in kinds))

    def times(self, on: bool) -> list[float]:
        """Seconds of each stage of the program since they were last asked for; on: whether to measure from now on."""
        return [nanoseconds * 1e-9 for nanoseconds in self._native.times(on)]

    def _memory(self, *rows: int) -> tuple[Tensor, Tensor]:
        """For so many rows of hidden states and of logits, or, where it has to stay where it is, for all logits."""
        results = (self.program.hidden, self.program.logits)
        with torch.inference_mode(False):
            if self.recordable:
                if rows[0] not in self._recorded:
                    shapes = [(rows[0], result.width) for result in results]
                    device = self._trace.device
                    hidden, logits = (torch.empty(shape, dtype=self._dtype, device=device) for shape in shapes)
                    self._recorded[rows[0]] = hidden, logits
                return self._recorded[rows[0]]
            for place, (count, result) in enumerate(zip(rows, results, strict=True)):
                if len(self._results[place]) < count:
                    self._results[place] = torch.empty((count, result.width), dtype=self._dtype)
        return self._results[0][: rows[0]], self._results[1][: rows[1]]


def records_fused(device: torch.device) -> bool:
    """Whether fused steps on the device may be captured; each of them is then of one text."""
    return device.type in NATIVE and NATIVE[device.type].recordable


def joined(parts: Sequence[Tensor]) -> Tensor:
    """One behind the other, contiguous; a single one, where it is, itself."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat([*parts])


def table_positions(cache: TreeCache, nodes: int) -> int:
    """For how many positions tables are made, which so many nodes behind the text are to find theirs in."""
    needed = min(cache.capacity, max(_AT_ONCE, cache.committed + nodes))
    return max(_MIN_POSITIONS, 1 << (needed - 1).bit_length())


def versions(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Changes when a tensor is written to by torch's ops, or lies elsewhere: copies are then of no use any more."""
    return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)


def _weights_of(products: list[Product | Grouped], packs: bool) -> list[Tensor]:
    """For each product its weights, one behind the other: packed, or as the model has them."""
    if not packs:
        return [_own(product) for product in products]
    most = [max(_packed_bytes(product), *_block_bytes(product).values()) for product in products]
    memory = large_memory(sum(map(_rounded, most)))  # of which the system gives what is written to
    weights, begin = [], 0
    for product, size in zip(products, most, strict=True):
        found = _pack(product, memory[begin : begin + size])
        weights.append(_own(product) if found is None else found)
        if found is not None:
            begin += _rounded(found.nbytes)
            for weight in product.weights if isinstance(product, Product) else [product.weight]:
                if weight.is_contiguous():
                    release_mapped(weight)  # of which there is a copy now
    return weights


def _in_blocks(products: list[Product | Grouped], packs: bool) -> list[Tensor]:
    """The same on a GPU: in blocks, or as the model has them.

    Where one lies at no multiple of 16 bytes, which no allocator of a GPU does, its product sums in another order than
    blocks do, as do those that are joined with it: then none is in blocks.
    """
    weights = [_own(product) for product in products]
    if not packs or any(weight.data_ptr() % 16 for weight in weights):
        return weights
    blocks = (
        in_blocks(own) if isinstance(product, Product) else None for product, own in zip(products, weights, strict=True)
    )
    return [own if found is None else found for own, found in zip(weights, blocks, strict=True)]


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _block_bytes(product: Product | Grouped) -> dict[torch.dtype, int]:
    """Of its weights in blocks, by the dtype that names their bits; 0: this processor has none such."""
    if isinstance(product, Grouped):
        return dict.fromkeys(BLOCKS.values(), 0)
    return {dtype: block_bytes(product.weights[0], product.output.width, bits) for bits, dtype in BLOCKS.items()}


def _kind(weight: Tensor) -> torch.dtype | None:
    """In which blocks it can be given, as its first rows say; linears of one input are one product where it is the
    same."""
    if weight.dim() != 2 or weight.dtype != torch.bfloat16:
        return None
    rows = weight[:_ROWS_OF_A_KIND].contiguous()
    for bits, dtype in BLOCKS.items():
        size = block_bytes(rows, len(rows), bits)
        if size and pack_blocks([rows], torch.empty(size, dtype=torch.uint8).view(dtype)):
            return dtype
    return None


def _packed_bytes(product: Product | Grouped) -> int:
    """0: it is multiplied as the model has it."""
    if isinstance(product, Product):
        return packed_bytes(product.weights[0], product.output.width)
    _, out_size, groups = product.sizes
    return 0 if product.transposed else groups * packed_bytes(product.weight[0], out_size)


def _pack(product: Product | Grouped, memory: Tensor) -> Tensor | None:
    """At the beginning of `memory`; None: it is multiplied as the model has it.

    In blocks where the weights came out of a file of fewer bits, and this processor makes them of those, to the bit.
    """
    if isinstance(product, Product):
        parts = [weight.contiguous() for weight in product.weights]
        for dtype, size in _block_bytes(product).items():
            if size and pack_blocks(parts, blocks := memory[:size].view(dtype)):
                return blocks
    packed = memory[: _packed_bytes(product)]
    if not len(packed):
        return None
    if isinstance(product, Product):
        pack_weights(parts, packed)
    else:
        for weight, part in zip(product.weight, packed.chunk(len(product.weight)), strict=True):
            pack_weights([weight.contiguous()], part)
    return packed


def _own(product: Product | Grouped) -> Tensor:
    if isinstance(product, Grouped):
        return product.weight.contiguous()
    parts = [weight.contiguous() for weight in product.weights]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _bias_of(product: Product | Grouped, dtype: torch.dtype) -> Tensor | None:
    if isinstance(product, Grouped):
        return product.bias
    if all(bias is None for bias in product.biases):
        return None
    parts: list[Any] = [
        torch.zeros(len(weight), dtype=dtype, device=weight.device) if bias is None else bias
        for weight, bias in zip(product.weights, product.biases, strict=True)
    ]
    return torch.cat(parts)


def _has_room(model: PreTrainedModel) -> bool:
    """Whether there is memory for copies of the weights: on a CPU one as they are and one in bytes, on a GPU blocks."""
    own = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cuda":
        return 5 * own // 8 + _SPARE <= torch.cuda.mem_get_info(model.device)[0]
    return 5 * own // 3 + _SPARE <= _free_memory()


def _free_memory() -> int:
    """Bytes that this machine has left; many where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return 1 << 62
