"""How the nodes of a draft tree attend: to the committed tokens and to their own ancestors, by `ops.tree_attention`.

It takes the place of a model's own attention in one of two ways:

    by name   models that call transformers' AttentionInterface call `tree_attention_forward` while a step runs
    by call   models that call torch's scaled_dot_product_attention themselves, with the keys and values of their cache,
              get `tree_attention_call` in its place, see row_invariant.py

A model whose attention does something that the op does not raises `UnsupportedAttention`. capability.py finds that out
before any text is generated.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import ops
from ..io.transformers_names import CACHE_ARGUMENTS
from .stand_ins import TreeStep, current_step
from .swap import Swap, config_swap

NAME = "cerberus_tree"
_CALL = "scaled_dot_product_attention"

# Keyword arguments of an attention function that do not change what it computes, for a causal model that has a cache.
_HARMLESS = {
    "position_ids", "use_cache", *CACHE_ARGUMENTS, "cache_position", "output_attentions", "output_hidden_states",
    "output_router_logits", "return_dict", "layer_idx", "is_causal",
}  # fmt: skip
_SHARING = ("full_attention", "sliding_attention")  # types of layers that may do without a cache of their own
_ATTENTIONS = AttentionInterface()
_MASKS = AttentionMaskInterface()


class Topology(Protocol):
    """What a forward has to know about a tree, on the device; TreeTensors is one."""

    @property
    def parents(self) -> Tensor: ...  # (N,) int64

    @property
    def ancestors(self) -> Tensor: ...  # (N, W) int64, bit masks

    @property
    def depths(self) -> Tensor: ...  # (N,) int64


class UnsupportedAttention(Exception):
    """The model's attention is not one that `ops.tree_attention` computes."""


def attention_switch(model: PreTrainedModel) -> Swap:
    """While inside, `model` calls `tree_attention_forward`."""
    return config_swap(configs_of(model), "_attn_implementation", _stand_in)


def _stand_in(own: str) -> str:
    """The name under which `tree_attention_forward` takes the place of the implementation `own`."""
    name = f"{NAME}_{own.replace('flash', 'fa')}"  # transformers treats whatever is called flash in its own way
    if name not in _ATTENTIONS:
        AttentionInterface.register(name, partial(tree_attention_forward, own))
        AttentionMaskInterface.register(name, partial(_mask, own))
    return name


def _mask(own: str, *args: Any, **kwargs: Any) -> Any:
    """The mask of a forward: none in a step, else that of the implementation `own`."""
    if current_step() is not None or own not in _MASKS:
        return None
    return _MASKS[own](*args, **kwargs)


def tree_attention_forward(
    own: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls.

    query (B, Hq, N, E); key, value (B, Hkv, S, E): in a step, a whole layer of the cache.
    Returns (B, N, Hq, E) and, in a step, no attention weights. Outside of a step it is the implementation `own`.
    """
    step = current_step()
    if step is None:
        return _own_attention(own, module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    name = type(module).__name__
    window, softcap, sinks = (kwargs.pop(key, None) for key in ("sliding_window", "softcap", "s_aux"))
    for argument, given in kwargs.items():
        if argument not in _HARMLESS and given is not None or argument == "is_causal" and given is False:
            raise UnsupportedAttention(f"{name} calls its attention with {argument}")
    if getattr(module, "is_causal", True) is False:
        raise UnsupportedAttention(f"{name} is not causal")
    if attention_mask is not None:
        raise UnsupportedAttention(f"{name} makes an attention mask of its own")
    if softcap and "softcap" not in _parameters(_own_attention(own, module)):
        softcap = None  # as the model's own does: torch's function has none, and older versions leave it out
    layer = getattr(module, "layer_idx", None)
    if layer is None or (window or 0) != step.windows[layer]:
        raise UnsupportedAttention(f"{name} does not say which window layer {layer} has")
    return _attend(step, query, key, value, scaling, window or 0, softcap or 0.0, sinks), None


def tree_attention_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """In a step, in the place of torch's scaled_dot_product_attention: the same arguments, (B, Hq, N, E) back.

    NotImplemented where it is not called with a whole layer of the cache.
    """
    step = current_step()
    layer = None if step is None else step.planes.get(key.data_ptr())
    if step is None or layer is None:
        return NotImplemented
    if attn_mask is not None and (step.mask is None or attn_mask.data_ptr() != step.mask.data_ptr()):
        raise UnsupportedAttention("the model adds something to its attention scores")
    return _attend(step, query, key, value, scale, step.windows[layer], 0.0, None).transpose(1, 2)


def _attend(
    step: TreeStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    step.attended += 1
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if sinks is not None:
        sinks = sinks.to(query.dtype)
    # The models' query is a view of a (B, N, Hq, E) tensor: this rarely copies.
    q = query.transpose(1, 2).contiguous()
    return ops.tree_attention(q, key, value, step.length, step.ancestors, scale, window, softcap, sinks)


@cache
def _parameters(function: Callable[..., Any]) -> Collection[str]:
    return inspect.signature(function).parameters


def _own_attention(own: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if own in _ATTENTIONS:
        return _ATTENTIONS[own]
    # "eager" is the name of a function in each model's module.
    for kind in type(module).__mro__:
        if found := getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None):
            return found
    raise UnsupportedAttention(f"{type(module).__name__} has no attention implementation {own!r}")


def names_attention(model: PreTrainedModel) -> bool:
    """Whether the model calls the implementation of attention that its config names."""
    if model._supports_attention_backend:
        return True
    ask = getattr(type(model), "_can_set_attn_implementation", None)
    try:
        return ask is not None and bool(ask())
    except (KeyError, OSError, TypeError):  # it reads the source of a class that was made without a file
        return False


def check_attention(model: PreTrainedModel) -> None:
    """Raises UnsupportedAttention where it can be told, without running the model, that its attention is not known."""
    config = model.config.get_text_config()
    if getattr(config, "alibi", False):
        raise UnsupportedAttention("it uses ALiBi, which goes by the place in the cache")
    if not names_attention(model) and not any(map(_mentions_call, {type(part).__module__ for part in model.modules()})):
        raise UnsupportedAttention(f"it calls neither transformers' attention interface nor torch's {_CALL}")


def _mentions_call(module: str) -> bool:
    """Whether the source of a module of Python names torch's function. torch's own are not asked."""
    try:
        return not module.startswith("torch.") and _CALL in inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # made without a file
        return False


def layer_windows(config: PreTrainedConfig) -> tuple[int, ...]:
    """Sliding window of every layer, 0 for full attention. Raises ValueError where a layer keeps something else."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    if "chunked_attention" in types or getattr(text, "attention_chunk_size", None) is not None:
        raise ValueError(
            f"decode: model must have full or sliding attention, {config.model_type} has chunked attention"
        )
    windows = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        shares = type(layer).__name__ == "DummyLayer" and index < len(types) and types[index] in _SHARING
        if shares:  # the keys of an earlier layer
            windows.append(text.sliding_window if types[index] == "sliding_attention" else 0)
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ValueError(
                "decode: model must have a key/value cache in every layer, with full or sliding attention,"
                f" layer {index} of {config.model_type} has a {type(layer).__name__}"
            )
        windows.append(getattr(layer, "sliding_window", 0))
    # Up to 5.5 there is nothing in the cache for layers at the end that read the keys of earlier ones.
    windows += [text.sliding_window if kind == "sliding_attention" else 0 for kind in types[len(windows) :]]
    return tuple(windows)


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configurations of the model and its parts, outer ones before inner ones, each once."""
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
