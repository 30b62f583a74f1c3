"""The header of a GGUF file: where its tensors are; and whether what it says fits the file and the model's sizes."""

from __future__ import annotations

import math
import mmap
import re
import struct
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..ops.blocks import BLOCK_SIZES

if TYPE_CHECKING:
    from gguf import GGUFReader

_STRING, _ARRAY, _UINT32 = 8, 9, 4
_ALIGNMENT = 32  # of the tensors, where the file names no other
_MAX_AXES = 4  # of ggml
FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 30
KNOWN_SIZES = {FLOAT32: (1, 4), FLOAT16: (1, 2), BFLOAT16: (1, 2), **BLOCK_SIZES}  # without gguf, which takes a while
_LEAST = (1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8)  # bytes of a value of each type, of strings and arrays when empty
_SIZES = (  # of the model, what they are called, and the tensor and its axis that have each
    ("embedding_length", "token_embd.weight", 0),
    ("vocab_size", "token_embd.weight", 1),
    ("feed_forward_length", "blk.0.ffn_down.weight", 0),  # ffn_up may be two in one
)


class FileTensor(NamedTuple):
    """kind: ggml's number. shape: as torch has it. begin, size: its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    size: int


class FileHeader(NamedTuple):
    """content: all of its bytes. tensors: by name."""

    content: bytes
    tensors: dict[str, FileTensor]


def read_header(path: Path) -> FileHeader:
    """Raises ValueError where a length in the header is more than what is left, or a tensor ends behind the file.

    gguf's reader believes them: one flipped bit, and it loops 2^40 times over nothing. The tensors of a file that gguf
    itself has to read, of another version or byte order, are not among those returned.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        header.walk()
        return FileHeader(data[: header.place], header.tensors)


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
        self.order, self.alignment = "<", _ALIGNMENT
        self.tensors: dict[str, FileTensor] = {}

    def walk(self) -> None:
        version = self.number("I")
        if version & 0xFFFF == 0:  # of a machine with the other byte order
            self.order, version = ">", version >> 24
        if version not in (2, 3):
            return  # lengths of 1 have four bytes; the reader says that it knows none but these
        tensors, pairs = self.number("Q"), self.number("Q")
        for _ in range(pairs):  # ends with the file at the latest, as all that is read is
            name, kind = self.text(), self.number("I")
            if (name, kind) == (b"general.alignment", _UINT32):
                self.alignment = max(1, self.number("I"))
            else:
                self.value(kind)
        found = [self.tensor() for _ in range(tensors)]
        end = max((tensor.begin + tensor.size for _, tensor in found), default=0)
        if (missing := self.place + end - self.size) > 0:  # or up to an alignment more, which the reader finds
            raise ValueError(f"its weights would end {missing} bytes behind it")
        begin = -(-self.place // self.alignment) * self.alignment
        if self.order == "<":
            self.tensors = {
                name.decode(errors="replace"): tensor._replace(begin=begin + tensor.begin) for name, tensor in found
            }

    def tensor(self) -> tuple[bytes, FileTensor]:
        """Its name, and where it is: counted from the end of the header."""
        name = self.text()
        if (axes := self.number("I")) > _MAX_AXES:
            raise ValueError(f"a tensor has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        kind = self.number("I")
        items, size = sizes_of(kind)
        return name, FileTensor(kind, shape, self.number("Q"), math.prod(shape) * size // items)

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

    def text(self) -> bytes:
        size = self.length(1)
        self.skip(size)
        return self.data[self.place - size : self.place]

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


def sizes_of(kind: int) -> tuple[int, int]:
    """Weights of a block, and its bytes; (1, 0) where gguf does not know it, either."""
    if kind in KNOWN_SIZES:
        return KNOWN_SIZES[kind]
    from gguf import GGML_QUANT_SIZES

    return GGML_QUANT_SIZES.get(kind, (1, 0))  # type: ignore[call-overload]


def _least(kind: int) -> int:
    if kind >= len(_LEAST):
        raise ValueError(f"{kind} is not a valid GGUFValueType")
    return _LEAST[kind]
