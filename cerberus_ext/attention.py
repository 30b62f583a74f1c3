"""How the nodes of a draft tree attend: to the committed tokens and to their own ancestors.

Two ways, the same result up to rounding:

    TreeAttention    `ops.tree_attention` behind transformers' AttentionInterface; the normal one
    MaskAttention    a 4-D mask for the model's own attention, for models that do not offer the interface or whose
                     attention does something that the op does not (soft caps, sinks, ...)

`find_attention` picks by what the model says about itself; a model that turns out at the first step to ask for more
raises `UnsupportedAttention` there, and the step is done again with the mask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from . import ops, reference
from .cache import TreeCache
from .transformers_names import CACHE_ARGUMENTS

NAME = "cerberus_tree"

# Keyword arguments of an attention function that do not change what it computes, for a causal model that has a cache.
_HARMLESS = {"position_ids", "use_cache", *CACHE_ARGUMENTS, "output_attentions", "layer_idx", "is_causal"}


class Topology(Protocol):
    """What a forward has to know about a tree, on the device; TreeTensors is one."""

    @property
    def parents(self) -> Tensor: ...  # (N,) int64

    @property
    def ancestors(self) -> Tensor: ...  # (N, W) int64, bit masks

    @property
    def depths(self) -> Tensor: ...  # (N,) int64


class UnsupportedAttention(Exception):
    """The model's attention is not the plain one that `ops.tree_attention` computes."""


@dataclass(frozen=True)
class TreeStep:
    """What the attention function has to know about a step; models hand it down as the keyword argument `tree_step`."""

    length: Tensor  # (B,) int64: committed tokens
    ancestors: Tensor  # (N, W) int64, see TreeTensors
    windows: tuple[int, ...]  # sliding window of every layer, 0: none


def tree_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    tree_step: TreeStep | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    query (B, Hq, N, E); key, value (B, Hkv, S, E): a whole layer of the cache.
    Returns (B, N, Hq, E) and no attention weights.
    """
    if tree_step is None:
        raise UnsupportedAttention(f"{type(module).__name__} does not hand keyword arguments down to its attention")
    for name, given in kwargs.items():
        if name not in _HARMLESS and given is not None or name == "is_causal" and given is False:
            raise UnsupportedAttention(f"{type(module).__name__} calls its attention with {name}")
    layer = getattr(module, "layer_idx", None)
    if layer is None or (sliding_window or 0) != tree_step.windows[layer]:
        raise UnsupportedAttention(f"{type(module).__name__} does not say which window layer {layer} has")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    # The models' query is a view of a (B, N, Hq, E) tensor: this rarely copies.
    q = query.transpose(1, 2).contiguous()
    return ops.tree_attention(q, key, value, tree_step.length, tree_step.ancestors, scaling, sliding_window or 0), None


# Only the attention function: without a mask function of that name, transformers makes no mask.
AttentionInterface.register(NAME, tree_attention_forward)


class TreeAttention:
    """Steps with `ops.tree_attention`."""

    whole_cache = True

    def __init__(self, windows: tuple[int, ...]) -> None:
        self.windows = windows

    def switched_on(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """While inside, the model calls `tree_attention_forward`."""
        return attention_implementation(model, NAME)

    def arguments(self, tree: Topology, cache: TreeCache) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""
        return {"tree_step": TreeStep(cache.length, tree.ancestors, self.windows)}


class MaskAttention:
    """Steps with the model's own attention and a mask."""

    whole_cache = False

    def __init__(self, model: PreTrainedModel, windows: tuple[int, ...]) -> None:
        self.windows = windows
        self.dtype = model.dtype
        self.layer_types = getattr(model.config.get_text_config(), "layer_types", None)
        own = model.config.get_text_config()._attn_implementation
        if own not in ("sdpa", "eager"):
            raise ValueError(
                "decode: model must use the attention implementation 'sdpa' or 'eager', since it takes its mask from"
                f" decode, got {own!r}: load it with attn_implementation='sdpa'"
            )

    def switched_on(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        return nullcontext()

    def arguments(self, tree: Topology, cache: TreeCache) -> dict[str, Any]:
        """attention_mask (B, 1, N, length + N), 0 where a node sees a slot; per layer type where windows differ."""
        masks = {window: self._mask(tree, cache, window) for window in set(self.windows)}
        if len(masks) == 1 or self.layer_types is None:
            return {"attention_mask": masks[self.windows[0]]}
        by_type = zip(self.layer_types, self.windows, strict=True)
        return {"attention_mask": {layer_type: masks[window] for layer_type, window in by_type}}

    def _mask(self, tree: Topology, cache: TreeCache, window: int) -> Tensor:
        slots = cache.committed + len(tree.parents)
        visible = reference.visible_slots(cache.length, tree.ancestors, slots, window)  # (B, N, slots)
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(self.dtype).min)[:, None]


def find_attention(model: PreTrainedModel, windows: tuple[int, ...]) -> TreeAttention | MaskAttention:
    """The way for this model, as far as it can be told without running it."""
    takes_keywords = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    if model._supports_attention_backend and takes_keywords:
        return TreeAttention(windows)
    return MaskAttention(model, windows)


def layer_windows(config: PreTrainedConfig) -> tuple[int, ...]:
    """Sliding window of every layer, 0 for full attention. Raises ValueError where a layer keeps something else."""
    windows = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                "decode: model must have a key/value cache in every layer, with full or sliding attention,"
                f" layer {index} of {config.model_type} has a {type(layer).__name__}"
            )
        windows.append(getattr(layer, "sliding_window", 0))
    types = getattr(config.get_text_config(), "layer_types", None) or ()
    if "chunked_attention" in types or getattr(config.get_text_config(), "attention_chunk_size", None) is not None:
        raise ValueError(
            f"decode: model must have full or sliding attention, {config.model_type} has chunked attention"
        )
    return tuple(windows)


@contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While inside, `model` uses the attention function registered as `name`; afterwards all is as it was."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        model.set_attn_implementation(name)
        if model.config.get_text_config()._attn_implementation != name:
            raise UnsupportedAttention(f"{type(model).__name__} cannot change its attention implementation")
        yield
    finally:
        # Setting a configuration sets those inside it, which come later here.
        for config, implementation in before:
            config._attn_implementation = implementation


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations that `set_attn_implementation` may change, outer ones before inner ones, each once."""
    found: dict[int, PreTrainedConfig] = {}

    def add(config: PreTrainedConfig) -> None:
        found.setdefault(id(config), config)
        for key in config.sub_configs:
            if (inner := getattr(config, key, None)) is not None:
                add(inner)

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            add(module.config)
    return list(found.values())
