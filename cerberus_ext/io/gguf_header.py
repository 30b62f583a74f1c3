"""Whether what the header of a GGUF file says fits the file: its lengths, and the sizes of its model."""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader

_STRING, _ARRAY = 8, 9
_MAX_AXES = 4  # of ggml
_LEAST = (1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8)  # bytes of a value of each type, of strings and arrays when empty
_SIZES = (  # of the model, what they are called, and the tensor and its axis that have each
    ("embedding_length", "token_embd.weight", 0),
    ("vocab_size", "token_embd.weight", 1),
    ("feed_forward_length", "blk.0.ffn_down.weight", 0),  # ffn_up may be two in one
)


def check_lengths(path: Path) -> None:
    """Raises ValueError where a length in the header is more than what is left, or a tensor ends behind the file.

    gguf's reader believes them: one flipped bit, and it loops 2^40 times over nothing.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Header(data).walk()


def check_sizes(reader: GGUFReader) -> None:
    """Raises ValueError where the metadata and the tensors are of models of different sizes.

    transformers builds what the metadata say: fewer layers without a word, or more than the memory has.
    """
    fields, tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}
    if "general.architecture" not in fields:
        raise ValueError("it has no general.architecture")
    prefix = fields["general.architecture"].contents()
    layers = [int(found[1]) for name in tensors if (found := re.match(r"blk\.(\d+)\.", name))]
    sizes = {"block_count": 1 + max(layers)} if layers else {}
    sizes |= {size: int(tensors[name].shape[axis]) for size, name, axis in _SIZES if name in tensors}
    for size, expected in sizes.items():
        field = fields.get(f"{prefix}.{size}")
        value = None if field is None else field.contents()
        if value is None and size in ("block_count", "embedding_length"):
            raise ValueError(f"it has no {prefix}.{size}")
        if value not in (None, expected) and not isinstance(value, list):  # a list is one of all layers
            raise ValueError(f"{prefix}.{size} is {value}, its weights are of {expected}")


class _Header:
    """Goes over a header, value by value."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.place = data, len(data), 4  # behind the magic
        self.order = "<"

    def walk(self) -> None:
        version = self.number("I")
        if version & 0xFFFF == 0:  # of a machine with the other byte order
            self.order, version = ">", version >> 24
        if version not in (2, 3):
            return  # lengths of 1 have four bytes; the reader says that it knows none but these
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):  # ends with the file at the latest, as all that is read is
            self.skip(self.length(1))
            self.value(self.number("I"))
        end = max((self.tensor_end() for _ in range(tensors)), default=0)
        if (missing := self.place + end - self.size) > 0:  # or up to an alignment more, which the reader finds
            raise ValueError(f"its weights would end {missing} bytes behind it")

    def tensor_end(self) -> int:
        """Counted from the end of the header."""
        from gguf import GGML_QUANT_SIZES

        self.skip(self.length(1))
        if (axes := self.number("I")) > _MAX_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        elements = math.prod(self.number("Q") for _ in range(axes))
        items, size = GGML_QUANT_SIZES.get(self.number("I"), (1, 0))  # type: ignore[call-overload]
        return self.number("Q") + elements * size // items

    def value(self, kind: int) -> None:
        if kind == _STRING:
            self.skip(self.length(1))
        elif kind == _ARRAY:
            item = self.number("I")
            count = self.length(_least(item))
            if item not in (_STRING, _ARRAY):
                self.skip(count * _least(item))
                return
            for _ in range(count):
                self.value(item)
        else:
            self.skip(_least(kind))

    def length(self, item: int) -> int:
        """A number of items, of at least `item` bytes each."""
        count = self.number("Q")
        if count * item > self.size - self.place:
            raise ValueError(f"a length of {count} at byte {self.place - 8} is more than what is left of the file")
        return count

    def number(self, code: str) -> int:
        start = self.place
        self.skip(struct.calcsize(f"={code}"))
        return int(struct.unpack_from(self.order + code, self.data, start)[0])

    def skip(self, size: int) -> None:
        self.place += size
        if self.place > self.size:
            raise ValueError("it ends within its header")


def _least(kind: int) -> int:
    if kind >= len(_LEAST):
        raise ValueError(f"{kind} is not a valid GGUFValueType")
    return _LEAST[kind]
