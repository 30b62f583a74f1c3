"""Weights that are mapped from a file: the system gets their memory back while nothing reads them.

Which it is safe to do at any time: whatever reads such a weight again, a step op by op or `model.generate`, gets its
bits from the file, and what was written to stays in memory. So nothing of a model changes, and nothing asks whether it
was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.step import release_mapped, trim_heap
from ..target.row_invariant import is_ours


def give_back(model: nn.Module) -> int:
    """Of its weights on a CPU, what lies in a file as it is there; and what the process has freed. Returns the bytes of
    the first. Nobody may write to the weights meanwhile."""
    given = _release([parameter for parameter in model.parameters() if _can_be(parameter)])
    trim_heap()
    return given


@contextmanager
def one_by_one(model: nn.Module) -> Iterator[None]:
    """While inside, a module's forward gives its mapped weights back at its end: not all of them are in memory at once
    where the model runs op by op."""
    with ExitStack() as hooks:
        for module in model.modules():
            own = [weight for weight in module.parameters(recurse=False) if weight.dim() >= 2 and _can_be(weight)]
            if own and _are_mapped(own) and not isinstance(module, nn.Embedding):  # of which few rows are read
                hooks.enter_context(module.register_forward_hook(partial(_give_back_after, own)))
        yield


def _can_be(weight: Tensor) -> bool:
    return is_ours(weight) and weight.device.type == "cpu" and weight.is_contiguous() and weight.numel() > 0


def _are_mapped(weights: Sequence[Tensor]) -> bool:
    """Whether reading them brings something into memory that can be given back; of weights beyond a page."""
    for weight in weights:
        weight.view(-1)[weight.numel() // 2].item()
    return _release(weights) > 0


def _give_back_after(weights: Sequence[Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
    with torch._C.DisableTorchFunction():  # a mode that reads the model's calls is not to see this one
        _release(weights)


def _release(weights: Sequence[Tensor]) -> int:
    return sum(release_mapped(weight.detach()) for weight in weights)
