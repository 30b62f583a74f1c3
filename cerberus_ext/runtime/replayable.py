"""What has to hold for a step, recorded or fused, that repeats what the model did once, without its Python."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import output_capturing

from ..target import model as target_model
from ..target.attention import names_attention


def obstacle(model: PreTrainedModel, what: str) -> str | None:
    """As far as it can be told without running the model; None: there is none. what: repeats its steps."""
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, whose copies of the weights do not outlive it"
    if name := _hooked(model):
        return f"the model has hooks ({name}), which {what} would not call"
    if not names_attention(model):
        return "the model computes its attention itself"
    return None


def _hooked(model: PreTrainedModel) -> str | None:
    """A module with hooks on its forward, those of accelerate's offloading included."""
    for module in _modules(model):
        hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        # transformers leaves its own where somebody once asked for hidden states; while nobody asks, they do nothing.
        calling = [hook for hook in hooks if getattr(hook, "__module__", None) != output_capturing.__name__]
        if "_hf_hook" in vars(module) or calling:
            name = next(name for name, found in model.named_modules() if found is module)
            return name or type(module).__name__
    return None


def memory_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Changes when recordings of the model are of no use any more, but not when its weights change in place.

    Where its tensors lie; and the types, switches, numbers and names in its modules, also in lists and dictionaries, by
    which adapters are chosen, scaled and turned off, and the forwards that were put in the place of their own.
    """
    tensors, modules = [], []
    for module in _modules(model):
        own = vars(module)
        for kept in (own["_parameters"], own["_buffers"]):
            tensors += [tensor.data_ptr() for tensor in kept.values() if tensor is not None]
        # What its call runs: its class's forward, or the one that somebody gave this module alone.
        modules += [type(module), id(own.get("forward"))]
        for name, value in own.items():
            if isinstance(value, _PLAIN):
                modules.append(value)
            elif isinstance(value, (dict, list)) and name not in _OF_ALL:
                values = value.items() if isinstance(value, dict) else enumerate(value)
                modules += [(key, one) for key, one in values if isinstance(one, _PLAIN)]
    products = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    return tensors, modules, products


def hooks_of(model: PreTrainedModel) -> tuple[int, ...]:
    """The numbers of all hooks on forwards but ours, which is there while a text is; no two hooks have the same."""
    numbers: list[int] = []
    for module in _modules(model):
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                numbers += [
                    number
                    for number, hook in hooks.items()
                    if getattr(hook, "__module__", None) != target_model.__name__
                ]
    return tuple(numbers)


_PLAIN = (int, float, str)
_OF_ALL = vars(nn.Module()).keys()  # what every module has: its parameters, hooks ...


def _modules(model: PreTrainedModel) -> list[nn.Module]:
    """As `model.modules()`, in another order, and in a tenth of the time: every decode asks."""
    found: list[nn.Module] = [model]
    seen = {id(model)}
    for module in found:
        for inner in module._modules.values():
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                found.append(inner)
    return found
