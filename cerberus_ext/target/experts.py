"""The experts of a mixture model in a decoding step: products by `ops.grouped_linear`, a fixed order of sums.

Models that call transformers' ExpertsInterface call `experts_forward` while a step runs on a CPU. What a token gets
then depends on its own experts alone, not on how many other tokens chose the same ones.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from .. import ops
from .attention import configs_of
from .row_invariant import plain
from .stand_ins import current_step
from .swap import Swap, config_swap

NAME = "cerberus_rows"
_EXPERTS = ExpertsInterface()


def experts_switch(model: PreTrainedModel, traced: bool = False) -> Swap | None:
    """While inside, `model` calls `experts_forward`; None where there is nothing to switch. traced: on any device."""
    if not traced and model.device.type != "cpu":
        return None
    if not any(hasattr(module, "is_transposed") for module in model.modules()):
        return None
    configs = [config for config in configs_of(model) if getattr(config, "_experts_implementation", None)]
    return config_swap(configs, "_experts_implementation", _stand_in) if configs else None


def _stand_in(own: str) -> str:
    """The name under which `experts_forward` takes the place of the implementation `own`."""
    name = f"{NAME}_{own}"
    if name not in _EXPERTS:
        ExpertsInterface.register(name, partial(experts_forward, own))
    return name


def experts_forward(own: str, module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor, *args: Any) -> Tensor:
    """The function that transformers calls.

    hidden (M, D); chosen, weights (M, k): the experts of every row and what each counts. Returns (M, D).
    Outside of a step it is the implementation `own`.
    """
    if current_step() is None or args:
        forward = type(module).forward.__wrapped__ if own == "eager" else _EXPERTS[own]
        return forward(module, hidden, chosen, weights, *args)
    gated = getattr(module, "has_gate", True)
    inner = _product(module, "gate_up_proj" if gated else "up_proj", hidden[:, None], chosen)
    inner = module._apply_gate(inner) if gated else module.act_fn(inner)
    outer = _product(module, "down_proj", inner, chosen)
    if getattr(module, "has_post_expert_norm", False):
        outer = module.post_expert_norm(outer)
    weighted = outer.float() * weights[..., None].float()  # (M, k, D)
    total = weighted[:, 0]
    for index in range(1, chosen.shape[1]):
        total = total + weighted[:, index]
    return total.to(hidden.dtype)


def _product(module: Any, name: str, rows: Tensor, chosen: Tensor) -> Tensor:
    """rows (M, k, I), or (M, 1, I) for all k, each times the weight of its expert, (M, k, O)."""
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    weight, bias = plain(getattr(module, name)), None if bias is None else plain(bias)
    return ops.grouped_linear(rows.contiguous(), weight, bias, chosen.contiguous(), module.is_transposed)
