"""The ops as torch knows them once the libraries are loaded, and what registers a fake implementation."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .libraries import load_libraries

load_libraries()

native = torch.ops.cerberus_ext

_LONGEST_AXIS = 2**48  # of a tensor without memory: torch does not count what is larger


def fake(op: Callable[..., Any], axes: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the fake implementation of `op`: what torch.compile and a "meta" tensor reach.

    It is called with all arguments of `op`, once devices and ranks are what prepare.cpp would let through.
    axes: "input MI, weight OI, bias? O": the names of tensors, a ? where None is one, and a letter for each axis.
    Raises RuntimeError as the op does.
    """
    name, signature = op.__name__, inspect.signature(op)

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            _check(name, axes, given.arguments)
            return function(*given.args)

        return torch.library.register_fake(f"cerberus_ext::{name}", checked)

    return register


def _check(op: str, axes: str, arguments: dict[str, Any]) -> None:
    first: tuple[str, Tensor] | None = None
    for name, letters in (text.split() for text in axes.split(", ") if text):
        tensor = arguments[name.rstrip("?")]
        if tensor is None and name.endswith("?"):
            continue
        name = name.rstrip("?")
        if tensor is None:
            raise RuntimeError(f"{op}: {name} must be a tensor, got None")
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            raise RuntimeError(f"{op}: {name} must be on {first[1].device} like {first[0]}, got {tensor.device}")
        if tensor.dim() != len(letters):
            raise RuntimeError(f"{op}: {name} must be of {len(letters)} axes, got {tuple(tensor.shape)}")
        if max(tensor.shape, default=0) >= _LONGEST_AXIS:
            raise RuntimeError(f"{op}: {name} must be of axes below {_LONGEST_AXIS}, got {tuple(tensor.shape)}")
