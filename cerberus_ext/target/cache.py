"""The KV cache of decoding: one preallocated tensor, to which a step adds nodes that may be forgotten again.

Slot s < length holds the token at absolute position s. A forward puts node i of its N tokens into slot length + i
without touching `length`; only `commit` (part of a tree) and `extend` (all of a prompt) make tokens permanent, so
giving nodes up costs nothing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from .. import ops

_LINE = 64  # bytes; torch's tensors begin with one


class UnevenLayers(ValueError):
    """Keys and values of a model's layers do not all have the same shape and dtype, as those of one tensor."""


class TreeCache(Cache):
    """A transformers cache for `decode`.

    tensor    (2 * layers, B, Hkv, S, E): keys of layer l at 2 l, values at 2 l + 1; None until layer 0 is
              first used, since only then its sizes are known for certain
    context   whether there is a layer more, behind the model's, for the context layer of heads
    length    (B,) int64 on the model's device: committed tokens
    committed the same number on the host, where the rows agree (B = 1)
    whole     what a layer hands to attention: the whole (B, Hkv, S, E) buffers (True: for `ops.tree_attention`) or a
              view of the slots in use (False: for the model's own attention)
    """

    def __init__(self, num_layers: int, capacity: int, batch: int, device: torch.device, context: bool = False) -> None:
        super().__init__(layers=[TreeCacheLayer(self, index) for index in range(num_layers)])
        self.capacity = capacity
        self.context = context
        self.tensor: Tensor | None = None
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.committed = 0
        self.whole = False

    def allocate(self, shape: torch.Size, like: Tensor) -> Tensor:
        """shape (B, Hkv, N, E) of the first keys that a model hands over -> the cache's tensor."""
        batch, heads, _, size = shape
        planes = 2 * (len(self.layers) + self.context)
        make = _zeros_on_demand if like.device.type == "cpu" else torch.zeros
        try:
            self.tensor = make((planes, batch, heads, self.capacity, size), dtype=like.dtype, device=like.device)
        except (MemoryError, ValueError) as error:  # of numpy, the latter where no address is so large
            raise MemoryError(
                f"decode: max_new_tokens: there is no memory for keys and values of {self.capacity} tokens"
            ) from error
        return self.tensor

    def planes(self) -> list[Tensor]:
        """Keys and values (B, Hkv, S, E) of the model's layers in turn, once a forward has filled it."""
        assert self.tensor is not None
        return list(self.tensor[: 2 * len(self.layers)].unbind())

    def context_planes(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, Hkv, S, E) of the context layer, once a forward has made them."""
        assert self.tensor is not None and self.context
        return self.tensor[-2], self.tensor[-1]

    def grow(self, capacity: int, kept: int) -> None:
        """Makes room for so many tokens. Of those that are there, the `kept` first stay."""
        old, self.capacity = self.tensor, capacity
        if old is not None:
            self.allocate(old.shape[1:], old)[:, :, :, :kept] = old[:, :, :, :kept]
            self.layers = [TreeCacheLayer(self, index) for index in range(len(self.layers))]  # whose keys lie elsewhere

    def begin_as(self, other: TreeCache, kept: int) -> None:
        """Copies the `kept` first tokens of another cache of the model, without touching `length`."""
        if kept:
            assert other.tensor is not None
            tensor = self.allocate(other.tensor.shape[1:], other.tensor) if self.tensor is None else self.tensor
            tensor[:, :, :, :kept] = other.tensor[:, :, :, :kept]

    def reset(self) -> None:
        """Forgets everything, so that another prompt can be put in."""
        self.length.zero_()
        self.committed = 0
        self.whole = False

    def extend(self, tokens: int) -> None:
        """Keeps the `tokens` first tokens of the last forward."""
        self.length += tokens
        self.committed += tokens

    def check_room(self, tokens: int) -> None:
        """Raises ValueError where a forward over so many tokens does not fit."""
        if self.committed + tokens > self.capacity:
            raise ValueError(
                f"TreeCache: {self.committed + tokens} tokens do not fit into a capacity of {self.capacity}"
            )

    def commit(self, path: Tensor, accepted: Tensor) -> None:
        """Keeps the accepted path of the last forward, see `ops.commit_cache`. Follow with `committed += ...`."""
        assert self.tensor is not None  # a forward has filled it
        ops.commit_cache(self.tensor, self.length, path, accepted)


class TreeCacheLayer(CacheLayerMixin):
    """One layer's share of a `TreeCache`."""

    def __init__(self, cache: TreeCache, index: int) -> None:
        super().__init__()
        self.cache = cache
        self.index = index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """key_states, value_states (B, Hkv, N, E): the first ones of this layer; they tell the sizes."""
        tensor = self.cache.tensor
        if tensor is None:
            tensor = self.cache.allocate(key_states.shape, key_states)
        planes, batch, heads, _, size = tensor.shape
        expected = (batch, heads, size, tensor.dtype, tensor.device)
        for name, states in (("keys", key_states), ("values", value_states)):
            got = (*states.shape[:2], states.shape[3], states.dtype, states.device)
            if got != expected:
                raise UnevenLayers(
                    f"TreeCache: {name} of layer {self.index} must have (rows, heads, head size, dtype, device)"
                    f" {expected} like the keys of layer 0, got {got}"
                )
        assert planes > 2 * self.index
        self.keys, self.values = tensor[2 * self.index], tensor[2 * self.index + 1]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """New keys and values (B, Hkv, N, E) -> those that attention is to read, see `TreeCache.whole`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.cache.check_room(key_states.shape[2])
        begin, end = self.cache.committed, self.cache.committed + key_states.shape[2]
        if self.cache.whole:
            # Models hold keys as (B, Hkv, N, E) views of (B, N, Hkv, E): this rarely copies.
            new_keys, new_values = key_states.transpose(1, 2).contiguous(), value_states.transpose(1, 2).contiguous()
            ops.write_cache(self.keys, self.values, new_keys, new_values, self.cache.length)
            return self.keys, self.values
        self.keys[:, :, begin:end] = key_states
        self.values[:, :, begin:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.cache.committed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that a forward of query_length tokens sees, position of the first of them)."""
        return self.cache.committed + query_length, 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    get_max_cache_shape = get_max_length  # its name up to 5.15


def _zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros on a CPU, but without writing them: the system gives memory, a large capacity's, when it is used."""
    size = math.prod(shape) * dtype.itemsize
    memory = torch.from_numpy(np.zeros(size + _LINE, np.uint8))
    begin = -memory.data_ptr() % _LINE
    return memory[begin : begin + size].view(dtype).view(shape)
