"""What has to hold for a step that repeats what the model did once, without running its Python: recorded or compiled.

obstacle    why a model's steps cannot be repeated so
memory_of   what they depend on: once it changes, they are of no use any more
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import output_capturing

from ..target.attention import names_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PLAIN = (int, float, str)


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
    for name, module in model.named_modules():
        hooks = chain(module._forward_hooks.values(), module._forward_pre_hooks.values())
        if hasattr(module, "_hf_hook") or not all(map(_is_idle, hooks)):
            return name or type(module).__name__
    return None


def _is_idle(hook: Any) -> bool:
    """transformers leaves its own where somebody once asked for hidden states; while nobody asks, they do nothing."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


def memory_of(model: PreTrainedModel) -> tuple[Any, ...]:
    """Changes when recordings of the model are of no use any more, but not when its weights change in place.

    Where its tensors lie; and the types, switches and names in its modules, with which adapters are turned on and off,
    and the forwards that were put in the place of their own.
    """
    tensors = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
    modules = tuple((*_kind(module), *filter(_is_plain, vars(module).values())) for module in model.modules())
    products = (torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled())
    return tensors, modules, products


def _kind(module: torch.nn.Module) -> tuple[type, int]:
    """What its call runs: its class's forward, or the one that somebody gave this module alone."""
    return type(module), id(vars(module).get("forward"))


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN)
