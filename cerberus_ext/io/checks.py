"""Checks of what a user gives: every message names the argument, what it must be and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

R = TypeVar("R")


def call(what: str, function: Callable[..., R], *arguments: Any) -> R:
    """The answer of a function of the user's. Raises RuntimeError, naming it, where it raises StopIteration.

    That would end a generator that it comes through, or arrive as an error of the generator's.
    """
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError(f"{what} must not raise StopIteration") from error


def as_number(value: Any, kind: type) -> Any:
    """Python's number for its own, numpy's and tensors without dimensions, of kind int or float; None: it is none."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    kinds = int | np.integer if kind is int else int | float | np.integer | np.floating
    return kind(value) if isinstance(value, kinds) and not isinstance(value, bool) else None


def check_integer(what: str, value: Any, min_value: int | None = None, max_value: int | None = None) -> int:
    """what: the argument, with whose it is. Raises TypeError and ValueError."""
    number = as_number(value, int)
    if number is None:
        raise TypeError(f"{what} must be an integer, got {value!r}")
    if min_value is not None and number < min_value or max_value is not None and number > max_value:
        bounds = f">= {min_value}" if max_value is None else f"in {min_value}..{max_value}"
        raise ValueError(f"{what} must be {bounds}, got {number}")
    return int(number)


def check_number(what: str, value: Any, bounds: str = "", fits: Callable[[float], bool] | None = None) -> float:
    """bounds: in words, what `fits` asks for. Without bounds, all but NaN fit. Raises TypeError and ValueError."""
    number = as_number(value, float)
    if number is None or fits is None and math.isnan(number):
        raise TypeError(f"{what} must be a number, got {value!r}")
    if fits is not None and not fits(number):
        raise ValueError(f"{what} must be {bounds}, got {number}")
    return float(number)
